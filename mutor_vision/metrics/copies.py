"""Copies of training images: is a sample nearer to its training image than another training image would be?

Each sample is compared with its nearest reference image, by the distance of their features. It counts as near when that
distance is at most the reference image's own to its nearest neighbour in the reference (the authenticity of Alaa et
al. 2022, arXiv 2102.08921). New images of the same distribution are near about half of the time, or less, so the share
says something beside that of held-out images only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mutor_vision.metrics import scores
from mutor_vision.metrics.guards import Caveat
from mutor_vision.metrics.metric import Found, Measured, Metric
from mutor_vision.runtime import Runtime, exact_float32, float64_device

SHOWN = 20  # closest pairs in the result
SURE = 3  # standard errors by which the samples' share must be above that of held-out images for a warning
ROWS_AT_ONCE = 1024  # pairs whose distance is computed again in float64


@dataclass(frozen=True)
class Nearest:
    """Of N images: the nearest reference image (N,) int64, its distance, and that image's own to its nearest neighbour
    in the reference (N,) float64."""

    index: Tensor
    distance: Tensor
    own: Tensor

    @property
    def near(self) -> Tensor:
        return (self.distance <= self.own).double()


class Copies(Metric):
    """The share of samples that are near, their mean distance, and the closest pairs, for a person to look at."""

    name = "copies"
    rows = reference_rows = held_out_rows = ("pool",)

    def compute(self, measured: Measured, prepared: None) -> Found:
        samples, reference, beside = measured.samples, measured.reference, measured.held_out
        rows = reference.rows("pool")
        with exact_float32():
            found = nearest(samples.rows("pool"), rows, measured.runtime)
            real = None
            if beside is not None and beside.rows("pool") is not None:
                real = nearest(beside.rows("pool"), rows, measured.runtime)
        results: dict[str, dict[str, Any]] = {
            "copies": {"name": measured.title("Near copies")} | _mean(found.near),
            "nearest_distance": {"name": measured.title("Nearest distance")} | _mean(found.distance),
        }
        if real is not None:
            results["copies"]["real"] = _mean(real.near) | {"of": "held-out"}
            results["nearest_distance"]["real"] = _mean(real.distance) | {"of": "held-out"}
        for result in results.values():
            result["protocol"] = {"n_reference": len(rows), "layer": "pool", "distance": "Euclidean"}
        same = samples.extracted.digests == reference.extracted.digests[found.index]
        exact = int(same.all(1).sum())
        section = {"equal_pixels": exact, "closest": _closest(found)}
        return Found(results, tuple(_caveats(results["copies"], exact, len(same))), {"copies": section})


def _caveats(copies: dict, exact: int, n: int) -> list[Caveat]:
    warnings = []
    if exact:
        warnings.append(Caveat("exact-copies", f"{exact:,} of {n:,} samples are reference images, pixel by pixel"))
    if "real" not in copies:
        text = "the share of near copies stands alone: new real images have one too; give --held-out"
        return [*warnings, Caveat("copies-alone", text)]
    real = copies["real"]
    error = (copies["standard_error"] ** 2 + real["standard_error"] ** 2) ** 0.5
    if copies["value"] > real["value"] + SURE * error:
        text = (f"{copies['value']:.1%} of the samples are as near to a reference image as its own neighbour, of "
                f"held-out images {real['value']:.1%}: look at the closest pairs (--copies-grid)")  # fmt: skip
        warnings.append(Caveat("near-copies", text))
    return warnings


def _mean(values: Tensor) -> dict[str, float]:
    """Mean and its standard error over images (N,), N at least 2."""
    return {"value": values.mean().item(), "standard_error": (values.std() / len(values) ** 0.5).item()}


def _closest(found: Nearest) -> list[dict]:
    """The pairs of the smallest distance, as indices in the order of the sources."""
    order = found.distance.argsort(stable=True)[:SHOWN].tolist()
    return [
        {"sample": index, "reference": found.index[index].item(), "distance": found.distance[index].item(),
         "reference_to_its_neighbour": found.own[index].item()}
        for index in order
    ]  # fmt: skip


def nearest(rows: Tensor, reference: Tensor, runtime: Runtime) -> Nearest:
    """Collective. (N, D) and (M, D) float32, the same on every rank, M at least 2 -> Nearest. Found in blocks with the
    float32 distances of precision and recall; the distance itself is then computed in float64 from the difference, as
    the product form loses the digits of a small one."""
    center = reference.mean(0)
    rows, columns = ((part - center).to(runtime.device) for part in (rows, reference))
    index = _nearest_column(rows, columns, None, runtime)
    used, back = index.unique(return_inverse=True)
    neighbour = _nearest_column(columns[used], columns, used, runtime)
    own = _distances(columns[used], columns, neighbour)[back.cpu()]
    return Nearest(index.cpu(), _distances(rows, columns, index), own)


def _nearest_column(rows: Tensor, columns: Tensor, itself: Tensor | None, runtime: Runtime) -> Tensor:
    """Collective. (A, D), (M, D) -> (A,) the nearest of the columns. itself (A,): the column that each row is, which is
    left out; None = none."""
    found = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    block = scores.BLOCK
    for i in list(range(0, len(rows), block))[runtime.rank :: runtime.world_size]:
        part = rows[i : i + block]
        best, index = part.new_full((len(part),), float("inf")), found[i : i + block]
        for j in range(0, len(columns), block):
            squared = scores.squared_distances(part, columns[j : j + block])
            if itself is not None:
                here = itself[i : i + block] - j
                inside = ((here >= 0) & (here < squared.shape[1])).nonzero().flatten()
                squared[inside, here[inside]] = float("inf")
            least, where = squared.min(1)
            index[:] = torch.where(least < best, where + j, index)
            best = torch.minimum(best, least)
    return runtime.all_reduce(found)


def _distances(rows: Tensor, columns: Tensor, index: Tensor) -> Tensor:
    """(A,) float64 on the CPU: distance of each row to the column of its index."""
    device = float64_device(rows.device)
    found = []
    for i in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(i, i + ROWS_AT_ONCE)
        difference = rows[part].to(device).double() - columns[index[part]].to(device).double()
        found.append(difference.square().sum(1).sqrt().cpu())
    return torch.cat(found)
