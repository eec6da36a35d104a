"""The settings of auxiliary losses: one frozen dataclass for each, and what all of them have in common.

TrainConfig has one field of each class. Adding a loss takes its class here, its field there, one file in objectives/
and a preset (docs/adding-an-objective.md).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from mutor_vision.errors import UserError
from mutor_vision.settings import Settings

if TYPE_CHECKING:
    from mutor_vision.config import TransformerConfig


class AuxiliaryCost(NamedTuple):
    """What an auxiliary loss adds to the forward pass of one image."""

    inputs: int = 0  # inputs of the transformer beside the image's tokens; each attends to at most all of those
    blocks: int = 0  # transformer blocks over the image's tokens, with weights of their own
    targets: int = 0  # states that the unembedding turns into logits


class AuxiliaryConfig(Settings):
    """Base of these classes. Each has the fields `weight` and `weight_schedule`, and is off by default."""

    implementation: ClassVar[str] = ""  # 'module:class' of its objectives.auxiliary.Auxiliary

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("weight", lambda weight: 0 <= weight <= 1, "0 to 1")
        self._require_one_of("weight_schedule", "constant", "linear")

    @property
    def active(self) -> bool:
        """Whether the loss is computed at all."""
        raise NotImplementedError

    def cost(self, model: "TransformerConfig") -> AuxiliaryCost:
        """What it adds; nothing when it is off."""
        raise NotImplementedError

    def weight_at(self, step: int, steps: int) -> float:
        """The loss's weight at optimizer step `step` (0-based) of `steps`."""
        if self.weight_schedule == "constant":
            return self.weight
        return self.weight * (1 - step / max(1, steps - 1))


@dataclass(frozen=True)
class RegisterConfig(AuxiliaryConfig):
    """MuToR's registers (arXiv 2505.10518, sections 3.2 and 3.4). Defaults: the paper's best, where it says; each
    question that the paper leaves open is one field here."""

    kind: str = "none"  # none (next-token baseline) | 1d | 2d
    count: int = 0  # registers per image; h * w = one at every slot
    max_offset: int = 4  # 1d: d in 1..max_offset; 2d: d_h and d_w in 1..max_offset
    min_offset_w: int = 1  # 2d: smallest d_w; 1 = the paper's quadrant, down to -3 adds neighbours below-left
    weight: float = 0.5  # a in (1 - a) L_next + a L_reg
    weight_schedule: str = "constant"  # constant | linear (from `weight` to 0 at the last step)
    offset_per: str = "sequence"  # draw an offset per sequence | register | batch
    edge: str = "wrap"  # a target across the grid's edge: wrap = raster order, ignore = no loss
    placement: str = "valid"  # slots drawn: valid = those with a target | all (those without get no loss)
    next_token: bool = True  # keep offset 1, which repeats next-token prediction
    class_slot: bool = True  # a register may sit at the class token
    self_attention: bool = True  # a register sees itself

    _prefix = "registers."
    implementation = "mutor_vision.objectives.register_loss:RegisterLoss"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("kind", "none", "1d", "2d")
        self._require_one_of("offset_per", "sequence", "register", "batch")
        self._require_one_of("edge", "wrap", "ignore")
        self._require_one_of("placement", "valid", "all")
        if (self.kind == "none") != (self.count == 0):
            raise UserError(
                f"registers.kind is '{self.kind}' with registers.count {self.count}; "
                "use kind none with count 0, or kind 1d or 2d with a positive count"
            )
        if self.count < 0 or self.max_offset < 1:
            raise UserError(f"registers.count {self.count} and max_offset {self.max_offset} must not be negative or 0")
        if self.min_offset_w > self.max_offset or (self.kind != "2d" and self.min_offset_w != 1):
            raise UserError(
                f"registers.min_offset_w is {self.min_offset_w}; only 2d registers have it, at most max_offset"
            )
        if self.max_offset == 1 and self.kind == "2d" and self.min_offset_w == 1:
            raise UserError("registers.max_offset 1 leaves no 2d offset: (1, 1) is the token itself; use 2 or more")
        if self.max_offset == 1 and self.kind == "1d" and not self.next_token:
            raise UserError("registers.max_offset 1 with next_token off leaves no offset; use 2 or more")

    @property
    def active(self) -> bool:
        return self.count > 0

    def cost(self, model: "TransformerConfig") -> AuxiliaryCost:
        return AuxiliaryCost(inputs=self.count, targets=self.count)


@dataclass(frozen=True)
class ParallelHeadsConfig(AuxiliaryConfig):
    """Multi-token prediction by parallel heads (arXiv 2404.19737)."""

    count: int = 1  # heads in all, the k-th predicts k tokens ahead; 1 = next-token only
    weight: float = 0.5  # a in (1 - a) L_next + a L_heads
    weight_schedule: str = "constant"  # constant | linear (from `weight` to 0 at the last step)

    _prefix = "parallel_heads."
    _short = "count"
    implementation = "mutor_vision.objectives.heads:ParallelHeads"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("count")

    @property
    def active(self) -> bool:
        return self.count > 1

    def cost(self, model: "TransformerConfig") -> AuxiliaryCost:
        targets = sum(model.num_tokens - k + 1 for k in range(2, self.count + 1))
        return AuxiliaryCost(blocks=self.count - 1, targets=targets)
