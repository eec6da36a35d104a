"""Density and coverage (Naeem et al. 2020, arXiv 2002.09797): precision and recall that one outlier cannot move.

A reference image's ball reaches to its k-th nearest other reference image. Density: in how many balls a sample lies, on
average, over k; above 1 where samples crowd. Coverage: the share of balls with a sample in them. Two equally large sets
of one distribution have density 1 and coverage 1 - 1 / 2^k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mutor_vision.errors import UserError
from mutor_vision.metrics import scores
from mutor_vision.metrics.metric import Found, Measured, Metric
from mutor_vision.runtime import Runtime, exact_float32


@dataclass(frozen=True)
class Occupation:
    """density_error: the standard error of the mean over samples. Coverage has none: the samples' share in its error is
    smaller than what leaving some out shows, and a wrong bar is worse than none."""

    density: float
    density_error: float
    coverage: float


class DensityCoverage(Metric):
    """How thickly samples lie among the reference images, and how many of these have a sample near them."""

    name = "dc"
    rows = reference_rows = held_out_rows = ("pool",)

    def compute(self, measured: Measured, prepared: None) -> Found:
        reference = measured.reference.rows("pool")
        held_out = None if measured.held_out is None else measured.held_out.rows("pool")
        k = min(measured.settings.density_k, len(reference) - 1)
        with exact_float32():
            balls = Balls(reference, k, measured.runtime)
            found = balls.occupied_by(measured.samples.rows("pool"))
            real = None if held_out is None else balls.occupied_by(held_out)
        density = {"name": measured.title("Density"), "value": found.density, "standard_error": found.density_error}
        coverage = {"name": measured.title("Coverage"), "value": found.coverage}
        protocol = {"k": k, "n_reference": len(reference), "distances": "float32", "layer": "pool"}
        if real is not None and held_out is not None:
            of = {"of": "held-out", "n": len(held_out)}
            density["real"] = {"value": real.density, "standard_error": real.density_error} | of
            coverage["real"] = {"value": real.coverage} | of
        return Found({"density": density | {"protocol": protocol}, "coverage": coverage | {"protocol": protocol}})


class Balls:
    """The balls of reference images (M, D) float32, the same on every rank. Collective."""

    def __init__(self, reference: Tensor, k: int, runtime: Runtime):
        if not 1 <= k < len(reference):
            raise UserError(f"density with k {k} and {len(reference)} reference images; k must be 1 to "
                            f"{len(reference) - 1}")  # fmt: skip
        self.k, self.runtime = k, runtime
        self.center = reference.mean(0)  # as in precision_recall: no distance changes, and rounding is smaller
        self.reference = (reference - self.center).to(runtime.device)
        self.radii = scores.neighbour_radii(self.reference, k, runtime)

    def occupied_by(self, samples: Tensor) -> Occupation:
        """Collective. Samples (N, D) float32, N at least 2. A ball is open, as in the authors' code, so that a set
        against itself has density 1."""
        samples, block = (samples - self.center).to(self.runtime.device), scores.BLOCK
        balls_of_sample = torch.zeros(len(samples), dtype=torch.int32, device=samples.device)
        in_ball = torch.zeros(len(self.reference), dtype=torch.int32, device=samples.device)
        pairs = [(i, j) for i in range(0, len(samples), block) for j in range(0, len(self.reference), block)]
        for i, j in pairs[self.runtime.rank :: self.runtime.world_size]:
            rows, columns = slice(i, i + block), slice(j, j + block)
            inside = scores.squared_distances(samples[rows], self.reference[columns]) < self.radii[columns]
            balls_of_sample[rows] += inside.sum(1, dtype=torch.int32)
            in_ball[columns] += inside.any(0)
        dense = self.runtime.all_reduce(balls_of_sample).cpu().double() / self.k
        covered = self.runtime.all_reduce(in_ball).cpu() > 0
        error = dense.std() / len(samples) ** 0.5
        return Occupation(dense.mean().item(), error.item(), covered.double().mean().item())
