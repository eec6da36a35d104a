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


def kernel_distance(samples: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000) -> Score:
    """(N, D), (M, D) float32 -> KID with the cubic kernel (Bińkowski et al. 2018, arXiv 1801.01401), by
    torch-fidelity, whose subsets are seeded. Unbiased, so values just below 0 are right for equal sets."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    if not 2 <= subset_size <= min(len(samples), len(reference)):
        raise UserError(
            f"KID with subsets of {subset_size} from {len(samples)} samples and {len(reference)} reference images; "
            "use 2 to the smaller of both"
        )
    found = kid_features_to_metric(
        samples.float().cpu(), reference.float().cpu(), kid_subsets=subsets, kid_subset_size=subset_size,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0,
        rng_seed=SHUFFLE_SEED, verbose=False,
    )  # fmt: skip
    return Score(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD])
