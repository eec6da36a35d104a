"""Inputs and targets of one batch of training.

Legend: B batch, N slots, R registers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mutor_vision.model.attention import AttentionPattern

NO_TARGET = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class TrainingSequence:
    """Inputs and targets of one batch. The class token is not among `tokens`: the transformer puts it at slot 0."""

    tokens: Tensor  # (B, N - 1 + R) int64: x_1 .. x_(N-1), then R times the register's id
    positions: Tensor  # (B or 1, N + R) int64: slot of every input
    pattern: AttentionPattern | None  # None = plain causal
    targets: Tensor  # (B, N + R) int64: token to predict, NO_TARGET where there is none
    num_regular: int  # N; the inputs after it are registers
    with_target: Tensor  # (K,) int64 in [0, B * R): the registers that have a target, counted over the batch
    offsets: np.ndarray | None = None  # (K, 2) their pairs (d_h, d_w), on the host
    labels: Tensor | None = None  # (B,) int64: the images' classes, where the model may see the null class
    features: Tensor | None = None  # (B, N, F) float16: a network's features of the cells, where a loss reads them

    @property
    def num_next_token_targets(self) -> int:
        return len(self.targets) * self.num_regular

    @property
    def num_register_targets(self) -> int:
        return len(self.with_target)


def next_token_sequence(
    codes: Tensor, labels: Tensor | None = None, features: Tensor | None = None
) -> TrainingSequence:
    """codes (B, h, w) int64 in [0, V) -> plain next-token prediction in raster order; the others as in the class."""
    raster = codes.flatten(1)
    n = raster.shape[1]
    slots = torch.arange(n, device=codes.device)[None]
    return TrainingSequence(raster[:, :-1], slots, None, raster, n, slots.new_empty(0), None, labels, features)
