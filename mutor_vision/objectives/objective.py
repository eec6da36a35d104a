"""The objective: next-token prediction and the auxiliary losses, each a mean over its own targets of the whole batch.
With MuToR's registers it is equation 4 of arXiv 2505.10518, L = (1 - a) L_next + a L_reg.

Legend: B batch, N slots.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.auxiliary import Auxiliary
from mutor_vision.objectives.cross_entropy import linear_cross_entropy
from mutor_vision.objectives.sequence import TrainingSequence, next_token_sequence

NEXT_TOKEN = "next_token"


class Objective(nn.Module):
    """Transformer and losses as one module, so that data parallelism has one forward to wrap. Losses go by name:
    NEXT_TOKEN first, then the auxiliaries in their order."""

    def __init__(self, transformer: Transformer, auxiliaries: Iterable[Auxiliary] = (), by_part: bool = False):
        """by_part: give the losses of each auxiliary's parts, too, as 'NAME PART' and with weight 0."""
        super().__init__()
        self.transformer = transformer
        modules: Any = nn.ModuleDict({auxiliary.name: auxiliary for auxiliary in auxiliaries})
        self.auxiliaries: Mapping[str, Auxiliary] = modules  # torch's stubs do not say what a ModuleDict holds
        for auxiliary in self.auxiliaries.values():
            auxiliary.begin(transformer)
        # Name of each loss but the next token's -> its auxiliary and part, '' = all of it.
        self.others = {name: (name, "") for name in self.auxiliaries} | {
            f"{name} {part}": (name, part)
            for name, own in self.auxiliaries.items()
            if by_part
            for part in own.part_names
        }

    @property
    def names(self) -> list[str]:
        return [NEXT_TOKEN, *self.others]

    def sequence(
        self, codes: Tensor, *, seed: int, sample_index: np.ndarray, step: int | None = None,
        labels: Tensor | None = None, features: Tensor | None = None,
    ) -> TrainingSequence:  # fmt: skip
        """codes (B, h, w) int64 -> what `forward` reads. labels (B,): the classes, none of them dropped; features
        (B, N, F): of the token set, where a loss reads them; the other arguments as in Auxiliary.extend."""
        sequence = next_token_sequence(codes, labels, features)
        for auxiliary in self.auxiliaries.values():
            sequence = auxiliary.extend(sequence, codes, seed=seed, sample_index=sample_index, step=step)
        return sequence

    def forward(self, labels: Tensor, sequence: TrainingSequence) -> dict[str, Tensor]:
        """labels (B,) int64 in [0, num_classes] -> each loss summed over its targets, scalars, cross-entropies in nats.
        Sums, so that means can be pooled over micro-batches and ranks, whose numbers of targets differ."""
        taps = {tap for auxiliary in self.auxiliaries.values() for tap in auxiliary.taps}
        states = self.transformer.states(sequence.tokens, labels, sequence.positions, sequence.pattern, taps=taps)
        hidden, targets = (each[:, : sequence.num_regular].flatten(0, 1) for each in (states["last"], sequence.targets))
        sums = {NEXT_TOKEN: linear_cross_entropy(hidden, self.transformer.head.weight, targets)}
        for name, (auxiliary, part) in self._parts(sequence).items():
            sums[name] = auxiliary(states, part, self.transformer)
        return sums

    def _parts(self, sequence: TrainingSequence) -> dict[str, tuple[Auxiliary, TrainingSequence]]:
        """Name of each loss but the next token's -> what computes it, and of which targets."""
        own = {name: self.auxiliaries[name] for name in self.auxiliaries}
        return {
            name: (own[of], own[of].part(sequence, part) if part else sequence)
            for name, (of, part) in self.others.items()
        }

    def after_step(self) -> None:
        """The optimizer has taken a step."""
        for auxiliary in self.auxiliaries.values():
            auxiliary.after_step(self.transformer)

    def counts(self, sequence: TrainingSequence) -> dict[str, int]:
        """Numbers of targets behind the sums."""
        others = {name: auxiliary.count(part) for name, (auxiliary, part) in self._parts(sequence).items()}
        return {NEXT_TOKEN: sequence.num_next_token_targets, **others}

    def weights(self, step: int) -> dict[str, float]:
        """Of the means, at the 0-based optimizer step."""
        others = {name: 0.0 if part else self.auxiliaries[of].weight(step) for name, (of, part) in self.others.items()}
        return {NEXT_TOKEN: 1 - sum(auxiliary.share(step) for auxiliary in self.auxiliaries.values()), **others}

    def on_held_out(self, transformer: Transformer) -> "Objective":
        """The losses that can be compared between runs and weights: of `transformer`, which may be the EMA, without the
        auxiliaries that have weights of their own, and those of the others by part."""
        comparable = [each for each in self.auxiliaries.values() if not each.state_dict()]
        return Objective(transformer, comparable, by_part=True)


def total_loss(sums: dict[str, Tensor], counts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighed sum of means. counts: of the whole batch, over all ranks; 0 is taken for 1."""
    return cast(Tensor, sum(weights[name] * sums[name] / counts[name].clamp(min=1) for name in sums))
