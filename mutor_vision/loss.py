"""Logits and targets -> loss (arXiv 2505.10518, equation 4): L = (1 - a) L_next + a L_reg, each a mean of
cross-entropies over its own valid targets, pooled over the batch."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mutor_vision.registers import NO_TARGET, TrainingSequence


@dataclass(frozen=True)
class LossSums:
    """Summed cross-entropies in nats, float32 scalars. Sums, so that means can be pooled over micro-batches and
    processes, whose numbers of register targets differ."""

    next_token: Tensor
    register: Tensor


def loss_sums(logits: Tensor, sequence: TrainingSequence) -> LossSums:
    """logits (B, N + R, V) float32 -> the two sums."""
    n = sequence.num_regular
    return LossSums(
        next_token=_cross_entropy(logits[:, :n], sequence.targets[:, :n]),
        register=_cross_entropy(logits[:, n:], sequence.targets[:, n:]),
    )


def total_loss(sums: LossSums, num_next_token: Tensor, num_register: Tensor | None, weight: float) -> Tensor:
    """Weigh sums by the numbers of targets of the whole batch; num_register None = no registers, weight unused."""
    if num_register is None:
        return sums.next_token / num_next_token
    return (1 - weight) * sums.next_token / num_next_token + weight * sums.register / num_register.clamp(min=1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum")
