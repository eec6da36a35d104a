"""MIND: a distance for few samples, without a covariance (Berthet et al., arXiv 2605.06797).

    3 D * mean over unit directions u of mean_i (sort(u X)_i - sort(u Y)_i)^2

X, Y (n, D): features of equally many images. It is the sliced Wasserstein distance, squared, scaled so that a
translation by t costs 3 |t|^2. Two samples of one distribution do not give 0, so real images stand beside the value.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mutor_vision.errors import UserError
from mutor_vision.metrics.frechet import jackknife_error
from mutor_vision.metrics.guards import Caveat
from mutor_vision.metrics.metric import Found, Measured, Metric
from mutor_vision.metrics.scores import SHUFFLE_SEED
from mutor_vision.runtime import Runtime, float64_device

DIRECTIONS_AT_ONCE = 128  # fixed, so that rounding does not depend on the ranks; 50,000 rows take 2 x 51 MB
ROWS_AT_ONCE = 4096  # converted to float64 at once


@dataclass(frozen=True)
class MongeDistance:
    """Of one pair of sets. standard_error: what other draws of both would change, None without groups."""

    value: float
    standard_error: float | None


class Mind(Metric):
    """The samples against the reference, and beside it real images against the reference at the same n."""

    name = "mind"
    rows = reference_rows = held_out_rows = ("pool",)

    def compute(self, measured: Measured, prepared: None) -> Found:
        runtime, settings = measured.runtime, measured.settings
        samples, reference = measured.samples.rows("pool"), measured.reference.rows("pool")
        held_out = None if measured.held_out is None else measured.held_out.rows("pool")
        n = min(len(rows) for rows in (samples, reference, held_out) if rows is not None)
        options = settings.directions, settings.groups, runtime
        found = monge_distance(samples, reference, n, *options)
        result: dict[str, Any] = {"name": f"MIND@{n}", "value": found.value}
        if found.standard_error is not None:
            result["standard_error"] = found.standard_error
        warnings = []
        if held_out is not None:
            floor = monge_distance(held_out, reference, n, *options)
            result["real"] = {"value": floor.value, "standard_error": floor.standard_error, "of": "held-out"}
            if n < min(len(samples), len(reference)):
                text = f"MIND is of {n:,} images, as many as are held out; with more it is finer"
                warnings.append(Caveat("mind-few-held-out", text))
        elif len(reference) >= 2 * n:
            first, second = two_parts(reference, n)
            floor = monge_distance(first, second, n, *options)
            result["real"] = {"value": floor.value, "standard_error": floor.standard_error, "of": "reference, split"}
        else:
            text = (f"MIND of {n:,} images stands alone: two sets of real images do not give 0 either; give "
                    f"--held-out, or a reference of {2 * n:,} images")  # fmt: skip
            warnings.append(Caveat("mind-alone", text))
        result["protocol"] = {
            "images_of_each_side": n, "directions": settings.directions, "seed": SHUFFLE_SEED,
            "n_reference": len(reference), "sums": "float64", "layer": "pool",
        }  # fmt: skip
        return Found({self.name: result}, tuple(warnings))


def monge_distance(
    first: Tensor, second: Tensor, n: int, directions: int, groups: int, runtime: Runtime
) -> MongeDistance:
    """Collective. (N, D), (M, D) features, the same on every rank -> MIND of n rows of each.

    n: rows, at most N and M; a set that has more gives a seeded choice of them. Choice and directions are those of
    torch-fidelity from 0.5 on, so values can be compared. groups: of the jackknife, which leaves out a group of both
    sets at once, so that they stay equal; 0, or fewer than two rows a group = no standard error. Memory does not grow
    with the number of directions."""
    if not 1 <= n <= min(len(first), len(second)) or directions < 1:
        raise UserError(f"MIND of {n} images and {directions} directions from {len(first)} and {len(second)} images; "
                        "use 1 to the smaller of both, and 1 direction or more")  # fmt: skip
    groups = groups if n >= 2 * groups else 0
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    sets = []
    for rows in (first, second):
        chosen = rows[torch.randperm(len(rows), generator=generator)[:n]] if len(rows) > n else rows
        sets.append(chosen.to(runtime.device))
    units = torch.randn(directions, first.shape[1], generator=generator)
    units = units / units.norm(dim=1, keepdim=True).clamp_min(1e-12)
    device = float64_device(runtime.device)
    found = torch.zeros(groups + 1, directions, dtype=torch.float64, device=device)
    starts = range(0, directions, DIRECTIONS_AT_ONCE)
    for start in starts[runtime.rank :: runtime.world_size]:
        stop = start + DIRECTIONS_AT_ONCE
        found[:, start:stop] = _along(sets[0], sets[1], units[start:stop].to(device).double(), groups)
    means = 3 * first.shape[1] * runtime.all_reduce(found).mean(1)
    return MongeDistance(means[0].item(), jackknife_error(means[1:]) if groups else None)


def _along(first: Tensor, second: Tensor, units: Tensor, groups: int) -> Tensor:
    """(n, D), (n, D), (U, D) -> (groups + 1, U): squared distance along each direction, of all rows and without each
    group; row i is in group i % groups."""
    (ours, our_order), (theirs, their_order) = (_projections(rows, units).sort(1) for rows in (first, second))
    found = [(ours - theirs).square().mean(1)]
    for group in range(groups):
        kept, kept_there = our_order % groups != group, their_order % groups != group
        rest = ours[kept].view(len(units), -1) - theirs[kept_there].view(len(units), -1)
        found.append(rest.square().mean(1))
    return torch.stack(found)


def _projections(rows: Tensor, units: Tensor) -> Tensor:
    """(n, D), (U, D) float64 -> (U, n) float64."""
    out = units.new_empty(len(units), len(rows))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[start : start + ROWS_AT_ONCE].to(units.device).double()
        out[:, start : start + ROWS_AT_ONCE] = units @ block.T
    return out


def two_parts(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A seeded choice of n rows, and of n others."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SHUFFLE_SEED))
    return rows[order[:n]], rows[order[n : 2 * n]]
