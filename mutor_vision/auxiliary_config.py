"""The settings of auxiliary losses: one frozen dataclass for each, and what all of them have in common.

TrainConfig has one field of each class. Adding a loss takes its class here, its field there, one file in objectives/
and a preset (docs/adding-an-objective.md).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mutor_vision.errors import MismatchError, UserError
from mutor_vision.offsets import look_ahead, parse_offsets
from mutor_vision.schedule import parse_weight_schedule, weight_factor
from mutor_vision.settings import Settings

if TYPE_CHECKING:
    from mutor_vision.config import TransformerConfig


class AuxiliaryCost(NamedTuple):
    """What an auxiliary loss adds to the forward pass of one image, and to the memory."""

    inputs: int = 0  # inputs of the transformer beside the image's tokens; each attends to at most all of those
    blocks: int = 0  # transformer blocks over the image's tokens, with weights of their own
    targets: int = 0  # states that an unembedding turns into logits
    parameters: int = 0  # trained, beside those of its blocks
    products: int = 0  # multiplications and additions of its own linear layers, beside blocks and unembedding
    kept: int = 0  # numbers that those layers keep for the backward pass, in the type in which they compute
    kept_wide: int = 0  # and in float32
    teacher_blocks: int = 0  # of the model's blocks, those that a teacher runs again, forward only
    teacher_parameters: int = 0  # weights that are kept and not trained


class AuxiliaryConfig(Settings):
    """Base of these classes. Each has the fields `weight` and `weight_schedule`, and is off by default."""

    weight: float
    weight_schedule: str

    implementation: ClassVar[str] = ""  # 'module:class' of its objectives.auxiliary.Auxiliary
    is_share: ClassVar[bool] = False  # `weight` is taken from the next token's: (1 - a) L_next + a L; or it is added
    has_weights: ClassVar[bool] = False  # of its own, with which an adapter cannot be trained
    reads_features: ClassVar[bool] = False  # of a network, another column of the token set

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_share:
            self._require("weight", lambda weight: 0 <= weight <= 1, "0 to 1")
        self._require_not_negative("weight")
        parse_weight_schedule(self.weight_schedule, f"{self._prefix}weight_schedule")

    @property
    def active(self) -> bool:
        """Whether the loss is computed at all."""
        return self.weight > 0

    @property
    def schedules(self) -> tuple[str, ...]:
        """Everything that follows schedule.parse_weight_schedule."""
        return (self.weight_schedule,)

    def cost(self, model: "TransformerConfig") -> AuxiliaryCost:
        """What it adds; nothing when it is off."""
        raise NotImplementedError

    def of_features(self, features: dict[str, Any] | None) -> "AuxiliaryConfig":
        """With what the token set's features decide, as its manifest describes them; None = it has none. Raises
        UserError where they are needed and missing, MismatchError where they are others."""
        return self

    def weight_at(self, step: int, steps: int, epoch_steps: float = 0.0) -> float:
        """The loss's weight at optimizer step `step` (0-based) of `steps`, with `epoch_steps` in an epoch."""
        return self.weight * weight_factor(self.weight_schedule, step, steps, epoch_steps)


@dataclass(frozen=True)
class RegisterConfig(AuxiliaryConfig):
    """MuToR's registers (arXiv 2505.10518, sections 3.2 and 3.4). Defaults: the paper's best, where it says; each
    question that the paper leaves open is one field here."""

    kind: str = "none"  # none (next-token baseline) | 1d | 2d
    count: int = 0  # registers per image; h * w = one at every slot
    offsets: str = ""  # 2d: these, each perhaps with its share (offsets.parse_offsets); '' = max_offset's
    max_offset: int = 4  # m; 1d: d in 1..m; 2d: d_h and d_w in 1..m
    max_offset_schedule: str = "constant"  # factors of m, as of a weight: '0:0.5,~50%:1' goes from near to far
    min_offset_w: int = 1  # 2d: smallest d_w; 1 = the paper's quadrant, down to -3 adds neighbours below-left
    weight: float = 0.5  # a in (1 - a) L_next + a L_reg
    weight_schedule: str = "constant"  # constant | linear | points: see schedule.parse_weight_schedule
    offset_per: str = "sequence"  # draw an offset per sequence | register | batch
    edge: str = "wrap"  # a target across the grid's edge: wrap = raster order, ignore = no loss
    placement: str = "valid"  # slots drawn: valid = those with a target | all (those without get no loss)
    next_token: bool = True  # keep offset 1, which repeats next-token prediction
    class_slot: bool = True  # a register may sit at the class token
    self_attention: bool = True  # a register sees itself

    _absent_in = {3: {"offsets": ""}, 4: {"max_offset_schedule": "constant"}}
    _prefix = "registers."
    implementation = "mutor_vision.objectives.register_loss:RegisterLoss"
    is_share = True

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
        if self.offsets and (self.kind != "2d" or not self.next_token):
            raise UserError(f"registers.offsets is '{self.offsets}'; only 2d registers have it, and next_token says "
                            "nothing beside it")  # fmt: skip
        parse_weight_schedule(self.max_offset_schedule, "registers.max_offset_schedule")
        if self.max_offset_schedule != "constant" and (self.offsets or self.min_offset_w > 1):
            raise UserError("registers.max_offset_schedule is a schedule of max_offset alone; leave out offsets and "
                            "min_offset_w above 1")  # fmt: skip
        if (0, 0) in parse_offsets(self.offsets, "registers.offsets"):
            raise UserError("registers.offsets has the cell itself, whose token has been read; leave it out")
        if self.max_offset == 1 and self.kind == "2d" and self.min_offset_w == 1 and not self.offsets:
            raise UserError("registers.max_offset 1 leaves no 2d offset: (1, 1) is the token itself; use 2 or more")
        if self.max_offset == 1 and self.kind == "1d" and not self.next_token:
            raise UserError("registers.max_offset 1 with next_token off leaves no offset; use 2 or more")

    @property
    def active(self) -> bool:
        return self.count > 0

    @property
    def schedules(self) -> tuple[str, ...]:
        return self.weight_schedule, self.max_offset_schedule

    def max_offset_at(self, step: int, steps: int, epoch_steps: float = 0.0) -> int:
        """m at a step, as weight_at: rounded, and at least what leaves an offset."""
        factor = weight_factor(self.max_offset_schedule, step, steps, epoch_steps)
        return max(round(factor * self.max_offset), 1 if self.kind == "1d" and self.next_token else 2)

    def cost(self, model: "TransformerConfig") -> AuxiliaryCost:
        return AuxiliaryCost(inputs=self.count, targets=self.count)


@dataclass(frozen=True)
class ParallelHeadsConfig(AuxiliaryConfig):
    """Multi-token prediction by parallel heads (arXiv 2404.19737)."""

    count: int = 1  # heads in all, the k-th predicts k tokens ahead; 1 = next-token only
    weight: float = 0.5  # a in (1 - a) L_next + a L_heads
    weight_schedule: str = "constant"  # constant | linear | points: see schedule.parse_weight_schedule

    _prefix = "parallel_heads."
    _short = "count"
    implementation = "mutor_vision.objectives.heads:ParallelHeads"
    is_share = has_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("count")

    @property
    def active(self) -> bool:
        return self.count > 1

    def cost(self, model: "TransformerConfig") -> AuxiliaryCost:
        targets = sum(model.num_tokens - k + 1 for k in range(2, self.count + 1))
        return AuxiliaryCost(blocks=self.count - 1, targets=targets)


@dataclass(frozen=True)
class PrivateBlocksConfig(AuxiliaryConfig):
    """Private prediction blocks on the last states, MTAR's head (arXiv 2608.25386). Defaults: the paper's."""

    weight: float = 0.0  # of the loss, added to that of the next token; 0 = off, MTAR: 0.1
    weight_schedule: str = "constant"  # constant | linear | points: see schedule.parse_weight_schedule
    offsets: str = "below"  # cells to predict from the cell of a state, as offsets.parse_offsets; each has its own head
    blocks: int = 2  # of each head; 0 = a linear head on the state that predicts the next token
    edge: str = "wrap"  # a target across the grid's edge: wrap = raster order, ignore = no loss

    _prefix = "private_blocks."
    implementation = "mutor_vision.objectives.private_blocks:PrivateBlocks"
    has_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_not_negative("blocks")
        self._require_one_of("edge", "wrap", "ignore")
        self.list_of_offsets()

    def list_of_offsets(self) -> list[tuple[int, int]]:
        return _list_of_offsets(self, tokens=True)

    def cost(self, model: "TransformerConfig") -> AuxiliaryCost:
        if not self.active:
            return AuxiliaryCost()
        heads = self.list_of_offsets()
        targets = sum(len(look_ahead(offset, model.grid, self.edge)[0]) for offset in heads)
        return AuxiliaryCost(
            blocks=len(heads) * self.blocks, targets=targets, parameters=len(heads) * model.vocab_size * model.dim,
            kept_wide=2 * targets * model.dim,
        )  # fmt: skip


class AlignmentConfig(AuxiliaryConfig):
    """Base of the losses that align a middle layer's states with other vectors, by projectors."""

    offsets: str
    depth: float
    projector_width: int
    reduction: str
    edge: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("depth", lambda depth: 0 < depth <= 1, "more than 0, at most 1")
        self._require_not_negative("projector_width")
        self._require_one_of("reduction", "sum", "mean")
        self._require_one_of("edge", "wrap", "ignore")
        self.list_of_offsets()

    def list_of_offsets(self) -> list[tuple[int, int]]:
        return _list_of_offsets(self, tokens=False)

    def tapped_blocks(self, model: "TransformerConfig") -> int:
        """How many blocks the states have passed that are aligned."""
        return max(1, round(self.depth * model.layers))

    def hidden_width(self, model: "TransformerConfig") -> int:
        """Of the projectors: 8/3 of the model's, which is Mirai's 2048 for 768, unless it is set."""
        return self.projector_width or round(8 * model.dim / 3)

    def cost_of_projectors(self, model: "TransformerConfig", width: int, states: int) -> AuxiliaryCost:
        """width: of what the states are aligned with; states: how many are taken through a projector, over all."""
        hidden, heads = self.hidden_width(model), self.list_of_offsets()
        matrices = hidden * (model.dim + hidden + width)
        return AuxiliaryCost(
            parameters=len(heads) * (matrices + 2 * hidden + width), products=2 * states * matrices,
            kept=states * (model.dim + 4 * hidden), kept_wide=states * 3 * width,
        )  # fmt: skip


@dataclass(frozen=True)
class AlignedStatesConfig(AlignmentConfig):
    """States of a middle layer aligned with their own average at neighbouring cells, Mirai-E (arXiv 2601.14671).
    Defaults: the authors' code with K = 3."""

    weight: float = 0.0  # of the loss, added to that of the next token; 0 = off, Mirai: 2
    weight_schedule: str = "constant"  # constant | linear | points; Mirai: 0:0,15e:1,80e:0.5
    offsets: str = "same right below"  # of the teacher's states, as offsets.parse_offsets; each has its projector
    depth: float = 2 / 3  # share of the blocks that the states have passed; Mirai: 8 of 12, 24 of 36
    projector_width: int = 0  # 0 = 8/3 of the model's
    decay: float = 0.9999  # of the teacher, from the first step on, without warm-up
    reduction: str = "sum"  # over the offsets: sum, as in the code | mean, as in the paper
    edge: str = "wrap"  # a target across the grid's edge: wrap = raster order, ignore = no loss
    class_slot: bool = True  # the class's state is aligned with the teacher's, for every offset

    _prefix = "aligned_states."
    implementation = "mutor_vision.objectives.aligned_states:AlignedStates"
    has_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_share("decay")

    def cost(self, model: "TransformerConfig") -> AuxiliaryCost:
        if not self.active:
            return AuxiliaryCost()
        blocks, c = self.tapped_blocks(model), model.dim
        embeddings = c * (model.vocab_size + model.num_classes + 2)
        cells = [look_ahead(offset, model.grid, self.edge)[1] for offset in self.list_of_offsets()]
        states = sum(int((each < model.num_tokens).sum()) + self.class_slot for each in cells)
        return self.cost_of_projectors(model, c, states)._replace(
            teacher_blocks=blocks, teacher_parameters=blocks * (model.block_parameters + 2 * c) + embeddings
        )


@dataclass(frozen=True)
class EncoderStatesConfig(AlignmentConfig):
    """States of a middle layer aligned with an image encoder's features, Mirai-I (arXiv 2601.14671). Defaults: the
    authors' code; the features are a column of the token set, made by `mutor encode --features`."""

    weight: float = 0.0  # of the loss, added to that of the next token; 0 = off, Mirai: 2
    weight_schedule: str = "constant"  # constant | linear | points: see schedule.parse_weight_schedule
    offsets: str = "same"  # of the features' cells, as offsets.parse_offsets; each has its projector
    depth: float = 2 / 3  # share of the blocks that the states have passed
    projector_width: int = 0  # 0 = 8/3 of the model's
    reduction: str = "sum"  # over the offsets: sum | mean
    edge: str = "wrap"  # a target across the grid's edge: wrap = raster order, ignore = no loss
    network: str = ""  # that made the features, '' = the token set's
    features_width: int = 0  # numbers a cell, 0 = the token set's

    _prefix = "encoder_states."
    implementation = "mutor_vision.objectives.encoder_states:EncoderStates"
    has_weights = reads_features = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_not_negative("features_width")

    def of_features(self, features: dict[str, Any] | None) -> "EncoderStatesConfig":
        if not self.active:
            return self
        if features is None:
            raise UserError("encoder_states needs features, and the token set has none; make them: mutor encode "
                            "--features timm:NAME, with the other arguments as before")  # fmt: skip
        for name, value in (("network", features["name"]), ("features_width", features["width"])):
            if getattr(self, name) not in ("", 0, value):
                raise MismatchError(f"encoder_states.{name} is {getattr(self, name)}, the token set has {value}; set "
                                    "it to that, or encode with other features")  # fmt: skip
        return replace(self, network=features["name"], features_width=features["width"])

    def cost(self, model: "TransformerConfig") -> AuxiliaryCost:
        """Without a token set, features are taken to be as wide as the model."""
        if not self.active:
            return AuxiliaryCost()
        states = sum(len(look_ahead(offset, model.grid, self.edge)[0]) for offset in self.list_of_offsets())
        return self.cost_of_projectors(model, self.features_width or model.dim, states)


def _list_of_offsets(own: PrivateBlocksConfig | AlignmentConfig, tokens: bool) -> list[tuple[int, int]]:
    """own.offsets, where they are a list and no distribution. tokens: what is at them is read, so that the cell itself
    is none of them."""
    found = parse_offsets(own.offsets, f"{own._prefix}offsets")
    if not found or ":" in own.offsets:
        raise UserError(f"{own._prefix}offsets is '{own.offsets}', expected one offset or more, without shares")
    if tokens and (0, 0) in found:
        raise UserError(f"{own._prefix}offsets has the cell itself, whose token has been read; leave it out")
    return list(found)
