"""FID and sFID: the Fréchet distance of two Gaussians, with error bars:

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))        (Heusel et al. 2017, arXiv 1706.08500, equation 6)

With S1 = A A^T and S2 = B B^T, the last trace is the sum of the singular values of A^T B. That way no number is
complex, and small eigenvalues keep digits that the square root of S1 S2 loses: any number of ranks and chunks gives the
same distance to 1e-9.
"""

from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from mutor_vision.errors import IntegrityError
from mutor_vision.features.moments import Moments, Statistics
from mutor_vision.metrics.metric import Found, Measured, Metric, Side
from mutor_vision.runtime import Runtime

NEGATIVE_TOLERANCE = 1e-6  # relative to the largest eigenvalue: one below minus this is refused, not rounded to 0
ROUNDING = 1e-6  # relative to the traces: a distance below minus this is refused, not rounded to 0


@dataclass(frozen=True)
class Root:
    """Statistics with a factored covariance: mu (D,), factor (D, r) with sigma = factor factor^T, trace = tr(sigma)."""

    mu: Tensor
    factor: Tensor
    trace: Tensor


@dataclass(frozen=True)
class Estimate:
    """A distance from one set of samples. The interval is around the bias-corrected value. It covers the chance of
    drawing other samples from the same generator, not that of training another one."""

    value: float
    bias_corrected: float
    standard_error: float
    interval_95: tuple[float, float]
    groups: int


class FrechetDistance(Metric):
    """The distance of one layer's features, with error bars where samples are images."""

    def __init__(self, name: str, title: str, layer: str, extractors: tuple[str, ...] = ()):
        self.name, self.title, self.layer, self.extractors = name, title, layer, extractors
        self.statistics = (layer,)

    def prepare(self, reference: Side) -> Root:
        return reference.once(f"root of {self.layer}", lambda: root(reference.statistics[self.layer]))

    def compute(self, measured: Measured, prepared: Root) -> Found:
        key, title, extractor = self.name, self.title, measured.extractor
        if extractor.identity["name"] != "inception":  # FID means Inception's features and no others
            key, title = "fd", f"FD-{extractor.identity['name']}"
        result = {"name": measured.title(title)} | self.of(measured.samples, prepared, measured.runtime)
        result["protocol"] = {
            "layer": self.layer, "features": extractor.layers[self.layer], "n_reference": measured.reference.n,
        }  # fmt: skip
        return Found({key: result})

    def of(self, images: Side, reference: Root, runtime: Runtime) -> dict:
        """Collective. A result's entries for the distance of these images: 'value', and error bars where there are."""
        return images.once(f"distance of {self.layer}", lambda: self._measure(images, reference, runtime))

    def _measure(self, images: Side, reference: Root, runtime: Runtime) -> dict:
        moments = images.extracted.moments[self.layer] if images.extracted else None
        if moments is None or len(moments.n) == 1:
            return {"value": distance(images.statistics[self.layer], reference)}
        estimate = jackknife(moments, reference, runtime)
        return {
            "value": estimate.value, "bias_corrected": estimate.bias_corrected,
            "standard_error": estimate.standard_error, "interval_95": list(estimate.interval_95),
            "jackknife_groups": estimate.groups,
        }  # fmt: skip


def root(statistics: Statistics, what: str = "the reference") -> Root:
    """Factor a covariance. Raises IntegrityError, naming `what`, when it has a negative eigenvalue."""
    values, vectors = torch.linalg.eigh(statistics.sigma)
    if values[0] < -NEGATIVE_TOLERANCE * values[-1].abs():
        raise IntegrityError(
            f"the covariance of {what} has the negative eigenvalue {values[0]:.3g}, expected none; make it again"
        )
    kept = values > _rounding_level(values)
    return Root(statistics.mu, vectors[:, kept] * values[kept].sqrt(), statistics.sigma.trace())


def distance(samples: Statistics, reference: Root) -> float:
    """Fréchet distance, at least 0. Computed on the reference's device."""
    device = reference.factor.device
    ours = root(Statistics(samples.mu.to(device), samples.sigma.to(device), samples.n), "the samples")
    shared = torch.linalg.svdvals(ours.factor.T @ reference.factor).sum()
    traces = ours.trace + reference.trace
    value = float((ours.mu - reference.mu).square().sum() + traces - 2 * shared)
    if value < -ROUNDING * float(traces):
        raise IntegrityError(f"the Fréchet distance came out as {value:.3g}; one covariance is none. Make it again")
    return max(value, 0.0)


def _distance_by_product(samples: Statistics, reference: Root) -> float:
    """The same distance by the eigenvalues of B^T S1 B, in a quarter of the time. Its rounding of 1e-8 of the traces is
    far below the errors that the jackknife estimates."""
    sigma = samples.sigma.to(reference.factor.device)
    product = reference.factor.T @ sigma @ reference.factor
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    shared = values[values > _rounding_level(values)].sqrt().sum()
    difference = samples.mu.to(reference.mu.device) - reference.mu
    return float(difference.square().sum() + sigma.trace() + reference.trace - 2 * shared)


def jackknife(samples: Moments, reference: Root, runtime: Runtime) -> Estimate:
    """Collective. Distance with error bars by the grouped jackknife, which leaves out each group in turn; it also
    removes the bias that falls as 1/n. Needs 2 or more groups with images.

    Source: Efron and Tibshirani 1993, chapter 11. With groups it needs one distance per group, not one per image.
    """
    groups = len(samples.n)
    value = distance(samples.total(), reference)
    # The last entry is the distance of all groups, computed like the others so that it has the same rounding.
    found = torch.zeros(groups + 1, dtype=torch.float64, device=reference.mu.device)
    for group in range(runtime.rank, groups + 1, runtime.world_size):
        statistics = samples.without(group) if group < groups else samples.total()
        found[group] = _distance_by_product(statistics, reference)
    found = runtime.all_reduce(found)
    left_out = found[:groups]
    bias_corrected = value - (groups - 1) * (left_out.mean() - found[groups]).item()
    error = jackknife_error(left_out)
    reach = float(stdtrit(groups - 1, 0.975)) * error
    return Estimate(value, bias_corrected, error, (bias_corrected - reach, bias_corrected + reach), groups)


def jackknife_error(left_out: Tensor) -> float:
    """(G,) float64 values, each without one of G groups -> standard error (Efron and Tibshirani 1993, chapter 11)."""
    groups = len(left_out)
    return ((groups - 1) / groups * (left_out - left_out.mean()).square().sum()).sqrt().item()


def _rounding_level(values: Tensor) -> Tensor:
    return values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
