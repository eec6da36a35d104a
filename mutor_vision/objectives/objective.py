"""The objective (arXiv 2505.10518, equation 4): L = (1 - a) L_next + a L_reg, each a mean of cross-entropies over its
own valid targets, pooled over the batch.

Legend: B batch, N slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mutor_vision.config import RegisterConfig
from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.cross_entropy import linear_cross_entropy
from mutor_vision.objectives.heads import ParallelHeads
from mutor_vision.objectives.sequence import TrainingSequence


class LossSums(NamedTuple):
    """Summed cross-entropies in nats, scalars. Sums, so that means can be pooled over micro-batches and processes,
    whose numbers of register targets differ."""

    next_token: Tensor
    register: Tensor  # or of the parallel heads, which come in registers' place


class Objective(nn.Module):
    """Transformer and cross-entropies as one module, so that data parallelism has one forward to wrap."""

    def __init__(self, transformer: Transformer, heads: ParallelHeads | None = None):
        super().__init__()
        self.transformer = transformer
        self.heads = heads

    def forward(self, labels: Tensor, sequence: TrainingSequence) -> LossSums:
        """labels (B,) int64 in [0, num_classes] -> the two sums. The head sees only inputs that have a target."""
        hidden = self.transformer.hidden(sequence.tokens, labels, sequence.positions, sequence.pattern)
        n, head = sequence.num_regular, self.transformer.head.weight
        next_token = linear_cross_entropy(hidden[:, :n].flatten(0, 1), head, sequence.targets[:, :n].flatten())
        if self.heads is not None:
            terms = [
                linear_cross_entropy(ahead.flatten(0, 1), head, sequence.targets[:, -ahead.shape[1] :].flatten())
                for ahead in self.heads(hidden, self.transformer.rope)
            ]
            return LossSums(next_token, torch.stack(terms).sum())
        if sequence.pattern is None:
            return LossSums(next_token, next_token.new_zeros(()))
        rows = sequence.with_target
        registers, targets = hidden[:, n:].flatten(0, 1)[rows], sequence.targets[:, n:].flatten()[rows]
        return LossSums(next_token, linear_cross_entropy(registers, head, targets))

    def num_other_targets(self, sequence: TrainingSequence) -> int:
        """Targets behind LossSums.register."""
        if self.heads is None:
            return sequence.num_register_targets
        return len(sequence.targets) * self.heads.num_targets(sequence.num_regular)


def register_weight(config: RegisterConfig, step: int, steps: int) -> float:
    """a at optimizer step `step` (0-based) of `steps`."""
    if config.weight_schedule == "constant":
        return config.weight
    return config.weight * (1 - step / max(1, steps - 1))


def total_loss(sums: LossSums, num_next_token: Tensor, num_register: Tensor | None, weight: float | None) -> Tensor:
    """Weigh sums by the numbers of targets of the whole batch; num_register None = next-token only, weight unused."""
    if num_register is None:
        return sums.next_token / num_next_token
    return (1 - weight) * sums.next_token / num_next_token + weight * sums.register / num_register.clamp(min=1)
