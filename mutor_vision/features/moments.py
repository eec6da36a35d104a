"""Mean and covariance of features in one pass, in float64, on any number of ranks, in groups for error bars.

Sums of squares lose digits where the mean is large against the deviation, so deviations are accumulated around a
running mean and merged pairwise (Chan, Golub, LeVeque 1983, equation 2.1).
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import IntegrityError, MismatchError
from mutor_vision.runtime import Runtime
from mutor_vision.storage.npz import Npz

BUFFERED_ROWS = 256  # rows of a group that are collected for one matrix product; one by one, memory limits the speed
SYMMETRY_TOLERANCE = 1e-5  # relative to the largest entry; wide enough for statistics saved in float32
TOO_LARGE = 1e100  # for a feature: its square, and sums of them, would leave the range of float64 and give FID inf
MAX_PROTOCOL = 10_000_000  # bytes of JSON; 20,000 class names are one million
LAYER_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names in reference files


@dataclass(frozen=True)
class Statistics:
    """mu (D,), sigma (D, D) float64; sigma divides by n - 1. n is None where a file does not say."""

    mu: Tensor
    sigma: Tensor
    n: int | None


class Moments:
    """Streaming mean and covariance of (B, dim) features in `groups` groups. Feed it with update, then all_reduce."""

    def __init__(self, dim: int, groups: int = 1, device: torch.device | str = "cpu"):
        self.n = torch.zeros(groups, dtype=torch.float64, device=device)
        self.mean = torch.zeros(groups, dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(groups, dim, dim, dtype=torch.float64, device=device)  # sum of outer deviations
        self._waiting: list[list[Tensor]] = [[] for _ in range(groups)]

    def update(self, features: Tensor, first_index: int = 0) -> None:
        """Add features (B, dim) of images first_index, first_index + 1, ...; image i is in group i % groups."""
        features = features.to(self.mean.device, non_blocking=True)
        groups = len(self.n)
        for group in range(groups):
            rows = features[(group - first_index) % groups :: groups]
            if len(rows):
                self._waiting[group].append(rows)
                if sum(map(len, self._waiting[group])) >= BUFFERED_ROWS:
                    self._flush(group)

    def _flush(self, group: int) -> None:
        if not self._waiting[group]:
            return
        rows = torch.cat(self._waiting[group]).double()
        self._waiting[group] = []
        count, mean = len(rows), rows.mean(0)
        deviations = rows - mean
        self.scatter[group].addmm_(deviations.T, deviations)
        delta, total = mean - self.mean[group], self.n[group] + count
        self.scatter[group].addr_(delta, delta * (self.n[group] * count / total))
        self.mean[group] += delta * (count / total)
        self.n[group] = total

    def flush(self) -> None:
        """Add the collected rows to the sums. Call it before reading n, mean or scatter."""
        for group in range(len(self.n)):
            self._flush(group)

    def all_reduce(self, runtime: Runtime) -> None:
        """Collective: afterwards every rank has the moments of all ranks' features."""
        self.flush()
        if runtime.world_size == 1:
            return
        n_here, mean_here = self.n.clone(), self.mean.clone()
        runtime.all_reduce(self.n)
        self.mean.mul_(n_here[:, None])
        runtime.all_reduce(self.mean)
        self.mean.div_(self.n.clamp(min=1)[:, None])
        for group in range(len(self.n)):
            delta = mean_here[group] - self.mean[group]
            self.scatter[group].addr_(delta, delta * n_here[group])
            runtime.all_reduce(self.scatter[group])

    def total(self) -> Statistics:
        """Statistics of all groups together. Needs 2 rows or more."""
        self.flush()
        n, mean, scatter = self._sum()
        return Statistics(mean, scatter / (n - 1), int(n))

    def without(self, group: int) -> Statistics:
        """Statistics of all groups but one."""
        n, mean, scatter = self._sum()
        rest = n - self.n[group]
        delta = self.mean[group] - mean
        # Removes a group: the inverse of the pairwise update (equation 2.1).
        scatter = scatter - self.scatter[group] - torch.outer(delta, delta * (self.n[group] * n / rest))
        return Statistics(mean - delta * (self.n[group] / rest), scatter / (rest - 1), int(rest))

    _cached: tuple[Tensor, Tensor, Tensor]

    def _sum(self) -> tuple[Tensor, Tensor, Tensor]:
        if not hasattr(self, "_cached") or self._cached[0] != self.n.sum():
            n = self.n.sum()
            mean = (self.n[:, None] * self.mean).sum(0) / n
            deltas = self.mean - mean
            scatter = self.scatter.sum(0) + deltas.T @ (self.n[:, None] * deltas)
            self._cached = n, mean, scatter
        return self._cached


def statistics_arrays(statistics: dict[str, Statistics], protocol: dict) -> dict[str, np.ndarray]:
    """Statistics by layer -> the members of an ADM reference file. The protocol is added as JSON bytes, which ADM's
    evaluator ignores; it needs 'n', 'extractor' (its identity) and 'image_size' (height, width)."""
    members = {}
    for layer, (mu, sigma) in LAYER_KEYS.items():
        if layer in statistics:
            members[mu] = statistics[layer].mu.cpu().numpy()
            members[sigma] = statistics[layer].sigma.cpu().numpy()
    text = json.dumps(protocol, sort_keys=True).encode()
    return members | {"protocol_json": np.frombuffer(text, np.uint8)}


def read_protocol(npz: Npz) -> dict | None:
    """The protocol that eval/reference.py wrote into a reference; None for files that it did not write."""
    header = npz.arrays.get("protocol_json")
    if header is None or header.dtype != np.uint8:
        return None
    protocol = None
    if len(header.shape) == 1 and header.shape[0] <= MAX_PROTOCOL:
        try:
            protocol = json.loads(npz.read("protocol_json").tobytes())
        except (ValueError, RecursionError):
            pass
    if not _is_protocol(protocol):
        raise IntegrityError(f"{npz.path}: 'protocol_json' is damaged; make the reference again")
    return protocol


def _is_protocol(value) -> bool:
    """Whether a value has the entries that statistics_arrays needs, of the right types."""
    if not isinstance(value, dict) or not isinstance(value.get("extractor"), dict):
        return False
    size, names = value.get("image_size"), value.get("class_names", [])
    return (
        type(value.get("n")) is int and value["n"] > 1
        and isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
        and isinstance(names, list) and all(isinstance(name, str) for name in names)
    )  # fmt: skip


def read_statistics(npz: Npz, layers: dict[str, int]) -> dict[str, Statistics]:
    """The statistics of an extractor's layers ({'pool': 2048, ...}) that a file has. Raises MismatchError when they are
    of another width, IntegrityError when they are not a mean and a covariance."""
    protocol = read_protocol(npz)
    n = protocol["n"] if protocol else None
    found = {}
    for layer, width in layers.items():
        mu_name, sigma_name = LAYER_KEYS.get(layer, ("", ""))
        if mu_name not in npz.arrays or sigma_name not in npz.arrays:
            continue
        mu_shape, sigma_shape = npz.arrays[mu_name].shape, npz.arrays[sigma_name].shape
        if len(mu_shape) != 1 or sigma_shape != (*mu_shape, *mu_shape):
            raise IntegrityError(
                f"{npz.path}: {mu_name} {mu_shape} and {sigma_name} {sigma_shape} are not a mean and its covariance"
            )
        if mu_shape != (width,):
            raise MismatchError(
                f"{npz.path}: {mu_name} has {mu_shape[0]} features, this extractor gives {width}; use the extractor "
                "that made the reference"
            )
        mu, sigma = (_read_float(npz, name) for name in (mu_name, sigma_name))
        found[layer] = check_statistics(Statistics(mu, sigma, n), f"{npz.path}: {sigma_name}")
    return found


def check_statistics(statistics: Statistics, what: str) -> Statistics:
    """The same statistics with sigma made exactly symmetric. Raises IntegrityError for what no features can have:
    values that are not finite or far too large, all zero, or not symmetric. (frechet.root refuses negative
    eigenvalues.)"""
    mu, sigma = statistics.mu, statistics.sigma
    largest = sigma.abs().max()
    if not torch.maximum(largest, mu.abs().max()) < TOO_LARGE:  # which NaN is not
        raise IntegrityError(
            f"{what}, or the mean beside it, holds NaN or infinity, or {TOO_LARGE:g} and more; make them again"
        )
    if largest == 0:
        raise IntegrityError(
            f"{what} is all zero, as from 1 image; the statistics need more images than their {len(mu)} features"
        )
    if (sigma - sigma.T).abs().max() > SYMMETRY_TOLERANCE * largest:
        raise IntegrityError(f"{what} is not symmetric, so it is no covariance; make the statistics again")
    return Statistics(mu, (sigma + sigma.T) / 2, statistics.n)


def _read_float(npz: Npz, name: str) -> Tensor:
    header = npz.arrays[name]
    if header.dtype.kind != "f":
        raise IntegrityError(f"{npz.path}: {name} is {header.dtype}, expected floating point")
    return torch.from_numpy(npz.read(name).astype(np.float64))
