"""The learning rate and the weights of auxiliary losses by step, and what is done every so many steps."""

import functools
import math
import re
from typing import NamedTuple

from mutor_vision.errors import UserError

_POINT = re.compile(r"(?P<straight>~?)(?P<at>\d+(?:\.\d+)?)(?P<unit>[e%]?):(?P<factor>\d+(?:\.\d+)?)")


class Point(NamedTuple):
    """From `at` on the factor holds."""

    at: float
    unit: str  # '' = steps, 'e' = epochs, '%' = share of the training
    factor: float
    straight: bool  # reached in a straight line from the point before it, instead of at once


@functools.cache
def parse_weight_schedule(text: str, setting: str = "weight_schedule") -> tuple[Point, ...]:
    """'constant', 'linear' (to 0 at the last step), or points AT:FACTOR with commas: AT in steps, in epochs ('15e') or
    as a share of the training ('75%'), after '~' in a straight line. The factor, 0 to 1, is 1 before the first point.
    So '0:0,15e:1,80e:0.5' is Mirai's, and '~75%:0' falls to 0 at three quarters of the training. setting: its name, for
    the UserError."""
    if text in ("constant", "linear"):
        return () if text == "constant" else (Point(100.0, "%", 0.0, True),)
    matches = [_POINT.fullmatch(part.strip()) for part in text.split(",")]
    found = [match for match in matches if match is not None]
    if len(found) < len(matches) or any(float(match["factor"]) > 1 for match in found):
        raise UserError(f"{setting} is '{text}', expected constant, linear or points with factors of 0 to 1, such as "
                        "0:0,15e:1,~75%:0")  # fmt: skip
    return tuple(Point(float(m["at"]), m["unit"], float(m["factor"]), bool(m["straight"])) for m in found)


def weight_factor(schedule: str, step: int, steps: int, epoch_steps: float = 0.0) -> float:
    """What a loss's weight is multiplied by at step `step` (0-based) of `steps`, with `epoch_steps` in an epoch."""
    level, begin = 1.0, 0.0
    for point in parse_weight_schedule(schedule):
        unit = {"": 1.0, "e": epoch_steps, "%": max(1, steps - 1) / 100}[point.unit]
        at = point.at * unit
        if step < at:
            return level + (point.factor - level) * (step - begin) / (at - begin) if point.straight else level
        level, begin = point.factor, at
    return level


def schedule_units(schedule: str) -> set[str]:
    """Of its points: a schedule with '%' depends on the number of steps, one with 'e' on the number of images."""
    return {point.unit for point in parse_weight_schedule(schedule)}


def learning_rate(
    step: int, *, schedule: str, lr: float, steps: int, warmup_steps: int = 0, min_lr: float = 0.0
) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then constant, or cosine from lr to min_lr."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def check_warmup(steps: int, warmup_steps: int) -> None:
    """Raise UserError for a warm-up that training would not leave."""
    if warmup_steps > steps:
        raise UserError(f"warmup_steps is {warmup_steps}, expected 0 to steps ({steps})")


def due(step: int, every: int, steps: int) -> bool:
    """Whether something is done after optimizer step `step` (1-based) of `steps`: after every `every`-th and after the
    last; every 0 = never."""
    return every > 0 and (step % every == 0 or step == steps)
