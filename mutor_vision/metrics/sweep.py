"""Search for the best guidance scale by golden section, which finds a single minimum in few evaluations. Every point
has the same seeds and labels, so that points differ by their guidance and hardly by chance."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutor_vision.errors import IntegrityError, MismatchError, UserError
from mutor_vision.metrics.report import markdown, number
from mutor_vision.storage.files import read_json, written

GOLDEN = (5**0.5 - 1) / 2


def golden_section(value: Callable[[float], float], low: float, high: float, tolerance: float) -> None:
    """Evaluate ever closer to the minimum of `value` in [low, high], until the interval is narrower than `tolerance`.
    Assumes that value falls and then rises. Each evaluation shrinks the interval by 0.618 (Kiefer 1953). Scales are
    rounded to 3 decimals, as they are reported."""
    if not (0 <= low < high < math.inf and 0.001 <= tolerance):
        raise UserError(f"search from {low} to {high} with tolerance {tolerance}; give 0 <= low < high, 0.001 or more")
    left, right = round(high - GOLDEN * (high - low), 3), round(low + GOLDEN * (high - low), 3)
    at_left, at_right = value(left), value(right)
    while high - low > tolerance and left < right:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = round(high - GOLDEN * (high - low), 3)
            at_left = value(left)
        else:
            low, left, at_left = left, right, at_right
            right = round(low + GOLDEN * (high - low), 3)
            at_right = value(right)


def read_record(path: Path, binding: dict) -> dict:
    """sweep.json of an earlier call, or an empty one: {'binding': ..., 'points': [...]}. binding: everything on which
    the numbers depend. Raises MismatchError, naming what changed, unless the earlier call had the same."""
    if not path.is_file():
        return {"binding": binding, "points": []}
    done = read_json(path)
    points = done.get("points") if isinstance(done, dict) else None
    if not isinstance(points, list) or not isinstance(done.get("binding"), dict) or not all(map(_is_point, points)):
        raise IntegrityError(f"{path} is no record of a sweep; give another --out")
    before = done["binding"]
    if changed := sorted(key for key in before.keys() | binding.keys() if before.get(key) != binding.get(key)):
        raise MismatchError(f"{path} is of another model, reference or settings ({', '.join(changed)}); repeat those, "
                            "or give another --out")  # fmt: skip
    return done


def _is_point(point) -> bool:
    kinds: dict[str, Any] = {"cfg_scale": (int, float), "value": (int, float), "name": str, "result": dict}
    return isinstance(point, dict) and all(isinstance(point.get(name), kind) for name, kind in kinds.items())


def best_of(points: list[dict]) -> dict:
    """The point with the least value; of equal ones, that with the least guidance."""
    return min(points, key=lambda point: (point["value"], point["cfg_scale"]))


def table(points: list[dict], name: str) -> str:
    """Markdown: scale, distance, its standard error and Inception Score where there are any; the best is marked."""
    best = best_of(points)
    rows: list[tuple[str, ...]] = [("cfg scale", name, "± s.e.", "IS", "")]
    for point in sorted(points, key=lambda point: point["cfg_scale"]):
        numbers = (number(point["value"]), number(point.get("standard_error")), number(point.get("is")))
        rows.append((f"{point['cfg_scale']:g}", *numbers, "best" if point is best else ""))
    return markdown(rows)


def plot(points: list[dict], name: str, path: Path) -> None:
    """The curve as a PNG, with error bars where there are any and the best scale marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = sorted(points, key=lambda point: point["cfg_scale"])
    scales, values = [point["cfg_scale"] for point in points], [point["value"] for point in points]
    errors = [point.get("standard_error") or 0.0 for point in points]
    best = best_of(points)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(scales, values, yerr=errors if any(errors) else None, marker="o", capsize=3, color="#1f4e79")
    axes.axvline(best["cfg_scale"], color="#b03a2e", linestyle=":", linewidth=1)
    axes.set_title(f"best: cfg scale {best['cfg_scale']:g}, {name} {best['value']:.4g}")
    axes.set_xlabel("classifier-free guidance scale")
    axes.set_ylabel(f"{name}, lower is better")
    axes.grid(alpha=0.3)
    with written(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))
