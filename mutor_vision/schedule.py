"""The learning rate by step, and what is done every so many steps."""

import math

from mutor_vision.errors import UserError


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
