"""Inception Score, precision and recall, KID.

Legend: N samples, M reference images, D features, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mutor_vision.errors import UserError
from mutor_vision.metrics.guards import ADM_SPLIT, Caveat
from mutor_vision.metrics.metric import Found, Measured, Metric, MetricSettings
from mutor_vision.runtime import Runtime, exact_float32

SHUFFLE_SEED = 2020  # torch-fidelity's, so that our numbers can be compared with its own
BLOCK = 4096  # rows and columns of a block of distances, 64 MB; fixed, so that rounding does not depend on the ranks
KERNEL_BLOCK = 1024  # rows and columns of one block of KID's kernel, 8 MB in float64


@dataclass(frozen=True)
class Score:
    """Mean and (population) standard deviation over splits or subsets."""

    mean: float
    std: float


class InceptionScore(Metric):
    """How sure the classifier is of each sample, and how many classes it sees."""

    name = "is"
    extractors = ("inception",)  # the score is of the classes of this one network
    rows = ("logits",)

    def check(self, num_samples: int, num_reference: int | None, settings: MetricSettings) -> None:
        if num_samples < settings.splits:
            raise UserError(f"Inception Score of {num_samples} samples in {settings.splits} splits; use --splits "
                            f"{num_samples} or fewer")  # fmt: skip

    def compute(self, measured: Measured, prepared: None) -> Found:
        splits, n = measured.settings.splits, measured.samples.n
        score = inception_score(measured.samples.extracted.rows["logits"], splits)
        result = {"name": measured.title("IS"), "value": score.mean, "standard_deviation": score.std}
        result["protocol"] = {"splits": splits, "shuffle_seed": SHUFFLE_SEED}
        if n >= ADM_SPLIT * splits:
            return Found({self.name: result})
        text = f"Inception Score over splits of {n // splits:,} images, published: {ADM_SPLIT:,}"
        return Found({self.name: result}, (Caveat("small-is-splits", text),))


def inception_score(logits: Tensor, splits: int = 10, shuffle_seed: int | None = SHUFFLE_SEED) -> Score:
    """logits (N, C) -> Inception Score (Salimans et al. 2016, arXiv 1606.03498) over `splits` equal parts, float64.

    ADM's evaluator splits 50,000 samples in the order of the file, so samples sorted by class score 41 instead of 157;
    here they are shuffled first. shuffle_seed None keeps the order. The score grows with N / splits."""
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


class PrecisionRecall(Metric):
    """How many samples lie among the reference images, and how many reference images among the samples."""

    name = "pr"
    rows = reference_rows = ("pool",)

    def check(self, num_samples: int, num_reference: int | None, settings: MetricSettings) -> None:
        assert num_reference is not None  # there are reference_rows
        smaller = min(num_samples, num_reference)
        if settings.k >= smaller:
            raise UserError(f"precision and recall with k {settings.k} and {smaller} images; k must be less")

    def compute(self, measured: Measured, prepared: None) -> Found:
        samples, reference = (side.extracted.rows["pool"] for side in (measured.samples, measured.reference))
        with exact_float32():
            values = precision_recall(samples, reference, measured.runtime, measured.settings.k)
        protocol = {"k": measured.settings.k, "n_reference": len(reference), "distances": "float32"}
        return Found({
            key: {"name": measured.title(key.capitalize()), "value": value, "protocol": protocol}
            for key, value in zip(("precision", "recall"), values, strict=True)
        })  # fmt: skip


def precision_recall(samples: Tensor, reference: Tensor, runtime: Runtime, k: int = 3) -> tuple[float, float]:
    """Collective. (N, D) and (M, D) float32 features -> precision: share of samples within a reference image's ball;
    recall: share of reference images within a sample's ball. A ball reaches to the k-th nearest neighbour in its own
    set (Kynkäänniemi et al. 2019, arXiv 1904.06991). Every rank gives the same features; blocks are split over ranks.
    """
    for name, own in (("samples", samples), ("reference images", reference)):
        if not 1 <= k < len(own):
            raise UserError(f"precision and recall with k {k} and {len(own)} {name}; k must be 1 to {len(own) - 1}")
    # Subtracting the same mean from both sets changes no distance, and makes its rounding smaller.
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
    """Collective. (N, D) -> (N,) squared distance to the k-th nearest other row. A block above the diagonal gives the
    distances of its rows and of its columns, so the blocks below are not computed."""
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
    of_all_ranks = rearrange(runtime.gather(nearest), "(rank n) k -> n (rank k)", rank=runtime.world_size)
    return of_all_ranks.sort(1).values[:, k - 1]


def _merge(nearest: Tensor, squared: Tensor, k: int) -> Tensor:
    """The k smallest of what was found before (B, k) and a block of squared distances (B, columns)."""
    found = squared.topk(min(k, squared.shape[1]), dim=1, largest=False, sorted=False).values
    return torch.cat([nearest, found], 1).topk(k, dim=1, largest=False, sorted=False).values


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(A, D), (B, D) float32 -> (A, B) squared distances, at least 0, by one product in IEEE float32."""
    squared = torch.addmm(rows.square().sum(1)[:, None], rows, columns.T, alpha=-2)
    return squared.add_(columns.square().sum(1)).clamp_(min=0)


class KernelDistance(Metric):
    """KID: a distance without the bias that FID has for few images."""

    name = "kid"
    rows = reference_rows = ("pool",)

    def compute(self, measured: Measured, prepared: None) -> Found:
        samples, reference = (side.extracted.rows["pool"] for side in (measured.samples, measured.reference))
        subsets = measured.settings.kid_subsets
        size = min(measured.settings.kid_subset_size, len(samples), len(reference))
        score = kernel_distance(samples, reference, subsets, size, measured.runtime.device)
        result = {"name": measured.title("KID"), "value": score.mean, "standard_deviation": score.std}
        result["protocol"] = {
            "subsets": subsets, "subset_size": size, "seed": SHUFFLE_SEED, "n_reference": len(reference),
            "kernel_dtype": "float64",
        }  # fmt: skip
        return Found({self.name: result})


def kernel_distance(
    samples: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000, device: torch.device | str = "cpu"
) -> Score:
    """(N, D), (M, D) -> KID with the cubic kernel (x y / D + 1)^3 (Bińkowski et al. 2018, arXiv 1801.01401), over
    torch-fidelity's seeded subsets, computed on `device`. Unbiased, so values just below 0 are right for equal sets.

    Computed in float64, because the value is a small difference of large sums; float32, as torch-fidelity has it,
    loses its digits when features are large."""
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
    """Sum of the cubic kernel, float64, over all pairs of a row and a column; without columns, over all pairs of two
    different rows. Computed in blocks, so that memory does not grow with the square of the number of rows."""
    total = rows.new_zeros(())
    for i in range(0, len(rows), KERNEL_BLOCK):
        block = rows[i : i + KERNEL_BLOCK]
        others = (rows if columns is None else columns).split(KERNEL_BLOCK)
        for j, other in enumerate(others):
            if columns is None and j * KERNEL_BLOCK < i:
                continue  # the kernel is symmetric: this block is counted with the one above the diagonal
            kernel = (block @ other.T / rows.shape[1] + 1) ** 3
            if columns is not None:
                total += kernel.sum()
            elif j * KERNEL_BLOCK == i:
                total += kernel.fill_diagonal_(0).sum()
            else:
                total += 2 * kernel.sum()
    return total
