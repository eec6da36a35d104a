"""What the benchmarks share: the machine in words, times of several sides taken in turns, and their table."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mutor_vision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every benchmark that times in turns."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU, 0 = torch's choice")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side (default 3)")
    parser.add_argument("--json", help="write the machine, sizes and every repeat here")


def machine(device: str | torch.device = "cpu") -> dict:
    """What a time depends on beside the code; to be written beside every time."""
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "mutor_vision": mutor_vision.__version__,
    }  # fmt: skip


def measure(
    sides: dict[str, Callable[[], object]], repeats: int, device: str | torch.device = "cpu", warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each repeat of each side. The sides take turns, and every other round goes backwards, so that a
    machine that gets slower or faster meanwhile is the same for all. CUDA is synchronised around each call."""
    device = torch.device(device)
    for _ in range(warmup):
        for side in sides.values():
            side()
    seconds = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            _synchronize(device)
            begun = time.perf_counter()
            sides[name]()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in seconds.items()}


def table(rows: list[dict]) -> str:
    """Rows of equal keys -> aligned text with the keys as its head. Floats get three digits, None is a dash."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        first, *rest = (f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
                        for i, (cell, width) in enumerate(zip(line, widths, strict=True)))  # fmt: skip
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def write(path: str | Path, result: dict) -> None:
    """A result as JSON: {'machine': ..., 'sizes': ..., 'seconds': every repeat, 'medians': ...}."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an architecture that names none
        return platform.processor() or platform.machine()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
