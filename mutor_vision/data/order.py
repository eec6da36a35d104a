"""The order in which training reads a token set. Sample k of a run is image order(seed, k // n)[k % n], so the position
in the data is the integer k alone: no sampler state has to be saved, and the number of processes may change."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mutor_vision.data.token_set import TokenSet
from mutor_vision.keyed_random import permutation, uniforms
from mutor_vision.runtime import to_device


@dataclass(frozen=True)
class Batch:
    """Samples of one step on one process."""

    codes: Tensor  # (B, h, w) int64
    labels: Tensor  # (B,) int64, num_classes where the class was dropped
    sample_index: np.ndarray  # (B,) int64: k
    classes: Tensor | None = None  # (B,) int64: labels without dropout
    features: Tensor | None = None  # (B, N, F) float16, where they are asked for

    def split(self, size: int) -> "list[Batch]":
        """In parts of at most `size` samples."""
        columns: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        columns = {name: column for name, column in columns.items() if column is not None}
        return [
            Batch(**{name: column[i : i + size] for name, column in columns.items()})
            for i in range(0, len(self.labels), size)
        ]


def split(token_set: TokenSet, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Image ids (training, held out). The same images are held out whatever the seed of the run."""
    order = permutation(0, "held out", 0, token_set.num_images)
    num_held_out = round(val_fraction * token_set.num_images)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


class SampleOrder:
    """Which image is sample k: every image once per epoch, in an order that depends on (seed, epoch)."""

    def __init__(self, images: np.ndarray, seed: int):
        self.images, self.seed = images, seed
        self._orders: dict[int, np.ndarray] = {}

    def image_of(self, k: np.ndarray) -> np.ndarray:
        epochs = k // len(self.images)
        ids = np.empty_like(k)
        for epoch in np.unique(epochs).tolist():
            if epoch not in self._orders:
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = permutation(self.seed, "order", epoch, len(self.images))
            rows = epochs == epoch
            ids[rows] = self.images[self._orders[epoch][k[rows] % len(self.images)]]
        return ids


def read_batch(
    token_set: TokenSet,
    order: SampleOrder,
    *,
    step: int,
    batch_size: int,
    rank: int,
    world_size: int,
    label_dropout: float,
    device: torch.device,
    features: bool = False,
) -> Batch:
    """The samples k of step `step` that fall to `rank`: every world_size-th of k in [step * batch_size, + batch_size).
    View and class dropout of sample k are drawn from (seed, k). features: read them, too, on the host."""
    k = np.arange(step * batch_size + rank, (step + 1) * batch_size, world_size)
    images = torch.from_numpy(order.image_of(k))
    views = torch.from_numpy((uniforms(order.seed, "view", k, 1)[:, 0] * token_set.num_views).astype(np.int64))
    dropped = torch.from_numpy(uniforms(order.seed, "class dropout", k, 1)[:, 0] < label_dropout)
    classes = token_set.labels[images]
    labels = classes.masked_fill(dropped, len(token_set.class_names))
    read = to_device(token_set.take_features(images, views), device) if features else None
    return Batch(
        to_device(token_set.take(images, views), device), to_device(labels, device), k, to_device(classes, device), read
    )
