"""Inception Score, precision and recall, KID.

Legend: N samples, M reference images, D features, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import UserError
from mutor_vision.runtime import Runtime

SHUFFLE_SEED = 2020  # torch-fidelity's, so that its own numbers can be checked against ours
BLOCK = 4096  # rows and columns of one block of distances, 64 MB; fixed, so that rounding never depends on the ranks
KERNEL_BLOCK = 1024  # rows and columns of one block of KID's kernel, 8 MB in float64


@dataclass(frozen=True)
class Score:
    """Mean and (population) standard deviation over splits or subsets."""

    mean: float
    std: float


def inception_score(logits: Tensor, splits: int = 10, shuffle_seed: int | None = SHUFFLE_SEED) -> Score:
    """logits (N, C) -> Inception Score (Salimans et al. 2016, arXiv 1606.03498) over `splits` equal parts, float64.

    ADM's evaluator cuts 50,000 samples into 10 parts as they come, so class-sorted samples score 41 instead of 157;
    here they are shuffled first. shuffle_seed None leaves the order alone. The score grows with N / splits."""
    if splits < 1 or len(logits) < splits:
        raise UserError(f"Inception Score of {len(logits)} samples in {splits} splits; use 1 to {len(logits)} splits")
    if shuffle_seed is not None:
        order = np.random.RandomState(shuffle_seed).permutation(len(logits))
        logits = logits[torch.from_numpy(order).to(logits.device)]
    scores = []
    for split in range(splits):
        part = logits[split * len(logits) // splits : (split + 1) * len(logits) // splits]
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(0).log())).sum(1)
        scores.append(divergence.mean().exp().item())
    return Score(float(np.mean(scores)), float(np.std(scores)))


def precision_recall(samples: Tensor, reference: Tensor, runtime: Runtime, k: int = 3) -> tuple[float, float]:
    """Collective. (N, D) and (M, D) float32 features -> precision: share of samples within a reference image's ball;
    recall: share of reference images within a sample's ball. A ball reaches to the k-th nearest neighbour in its own
    set (Kynkäänniemi et al. 2019, arXiv 1904.06991). Every rank gives the same features; blocks are split over ranks.
    """
    for name, rows in (("samples", samples), ("reference images", reference)):
        if not 1 <= k < len(rows):
            raise UserError(f"precision and recall with k {k} and {len(rows)} {name}; k must be 1 to {len(rows) - 1}")
    # Distances do not change, and their rounding shrinks, when both sets move to the reference's mean.
    center = reference.mean(0)
    samples = (samples - center).to(runtime.device)
    reference = (reference - center).to(runtime.device)
    sample_radii = neighbour_radii(samples, k, runtime)
    reference_radii = neighbour_radii(reference, k, runtime)
    in_reference = torch.zeros(len(samples), dtype=torch.int32, device=runtime.device)
    in_samples = torch.zeros(len(reference), dtype=torch.int32, device=runtime.device)
    pairs = [(i, j) for i in range(0, len(samples), BLOCK) for j in range(0, len(reference), BLOCK)]
    for i, j in pairs[runtime.rank :: runtime.world_size]:
        rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
        squared = squared_distances(samples[rows], reference[columns])
        in_reference[rows] += (squared <= reference_radii[columns]).any(1)
        in_samples[columns] += (squared <= sample_radii[rows, None]).any(0)
    in_reference, in_samples = runtime.all_reduce(in_reference), runtime.all_reduce(in_samples)
    return (in_reference > 0).double().mean().item(), (in_samples > 0).double().mean().item()


def neighbour_radii(features: Tensor, k: int, runtime: Runtime) -> Tensor:
    """Collective. (N, D) -> (N,) squared distance to the k-th nearest other row. Blocks above the diagonal serve rows
    and columns, so half of the products suffice."""
    nearest = features.new_full((len(features), k), float("inf"))
    starts = range(0, len(features), BLOCK)
    pairs = [(i, j) for i in starts for j in starts if i <= j]
    for i, j in pairs[runtime.rank :: runtime.world_size]:
        rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
        squared = squared_distances(features[rows], features[columns])
        if i == j:
            squared.fill_diagonal_(float("inf"))
        else:
            nearest[columns] = _merge(nearest[columns], squared.T.contiguous(), k)
        nearest[rows] = _merge(nearest[rows], squared, k)
    gathered = runtime.gather(nearest).view(runtime.world_size, len(features), k)
    return gathered.movedim(0, 1).flatten(1).sort(1).values[:, k - 1]


def _merge(nearest: Tensor, squared: Tensor, k: int) -> Tensor:
    """The k smallest of what was found before (B, k) and a block of squared distances (B, columns)."""
    found = squared.topk(min(k, squared.shape[1]), dim=1, largest=False, sorted=False).values
    return torch.cat([nearest, found], 1).topk(k, dim=1, largest=False, sorted=False).values


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(A, D), (B, D) float32 -> (A, B) squared distances, at least 0, by one product in IEEE float32."""
    squared = torch.addmm(rows.square().sum(1)[:, None], rows, columns.T, alpha=-2)
    return squared.add_(columns.square().sum(1)).clamp_(min=0)


def kernel_distance(
    samples: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000, device: torch.device | str = "cpu"
) -> Score:
    """(N, D), (M, D) -> KID with the cubic kernel (x y / D + 1)^3 (Bińkowski et al. 2018, arXiv 1801.01401), over
    torch-fidelity's seeded subsets, computed on `device`. Unbiased, so values just below 0 are right for equal sets.

    In float64: the value is a small difference of large sums, of which float32 (torch-fidelity) loses digits when
    features are large."""
    if not 2 <= subset_size <= min(len(samples), len(reference)):
        raise UserError(
            f"KID with subsets of {subset_size} from {len(samples)} samples and {len(reference)} reference images; "
            "use 2 to the smaller of both"
        )
    draws = np.random.RandomState(SHUFFLE_SEED)
    found = []
    for _ in range(subsets):
        x, y = (
            rows[torch.from_numpy(draws.choice(len(rows), subset_size, replace=False)).to(rows.device)]
            .to(device).double()
            for rows in (samples, reference)
        )  # fmt: skip
        pairs = subset_size * (subset_size - 1)
        found.append((_kernel_sum(x) + _kernel_sum(y)) / pairs - 2 * _kernel_sum(x, y) / subset_size**2)
    values = torch.stack(found).cpu()
    return Score(values.mean().item(), values.std(correction=0).item())


def _kernel_sum(rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """Sum of the cubic kernel over all pairs of a row and a column, float64; over all pairs of two different rows where
    there are no columns. Block by block, so that memory does not grow with the square of their number."""
    total = rows.new_zeros(())
    for i in range(0, len(rows), KERNEL_BLOCK):
        block = rows[i : i + KERNEL_BLOCK]
        others = (rows if columns is None else columns).split(KERNEL_BLOCK)
        for j, other in enumerate(others):
            if columns is None and j * KERNEL_BLOCK < i:
                continue  # the kernel is symmetric: counted with the block on the other side of the diagonal
            kernel = (block @ other.T / rows.shape[1] + 1) ** 3
            if columns is not None:
                total += kernel.sum()
            elif j * KERNEL_BLOCK == i:
                total += kernel.fill_diagonal_(0).sum()
            else:
                total += 2 * kernel.sum()
    return total
