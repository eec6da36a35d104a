"""The log of a training run: log.jsonl, status.json, and the trackers that show it elsewhere."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mutor_vision.storage.files import write_json, written
from mutor_vision.storage.trackers import open_trackers


class RunLog:
    """Writes on one rank; on the others every call does nothing.

    Opening it for a run that continues after `step` drops the lines that a killed process wrote beyond that step, so
    log.jsonl has each step once.
    """

    def __init__(self, run: Path, step: int, steps: int, *, active: bool, trackers: Sequence[str] = (),
                 config: dict[str, Any] | None = None):  # fmt: skip
        """trackers: of trackers.TRACKERS, beside TensorBoard. config: what they show of the run's settings."""
        self.run, self.steps, self.active, self.trackers = run, steps, active, []
        if not active:
            return
        path = run / "log.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if (found := _parsed(line)) and found["step"] <= step]
        with written(path) as partial:
            partial.write_text("".join(line + "\n" for line in kept))
        self.file = open(path, "a", buffering=1)
        self.trackers = open_trackers(trackers, run, step, config or {})

    def write(self, step: int, **values: float) -> None:
        """One line of numbers at an optimizer step."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self.trackers:
            tracker.numbers(step, values)

    def picture(self, step: int, path: Path) -> None:
        """A picture of the run, such as samples/step-0000100.png; log.jsonl has none."""
        for tracker in self.trackers:
            tracker.picture(step, path.parent.name, path)

    def status(self, state: str, step: int, reason: str = "") -> None:
        """status.json: 'running', 'done', 'failed' or 'preempted', at which of how many steps and why."""
        if self.active:
            write_status(self.run, state, step, self.steps, reason)

    def failed(self, step: int, error: BaseException) -> None:
        """status.json: an error ended the run at `step`; an error that is none says in `state` what it is."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.status(getattr(error, "state", "failed"), step, reason)

    def close(self) -> None:
        if self.active:
            self.file.close()
            for tracker in self.trackers:
                tracker.close()


def write_status(run: Path, state: str, step: int, steps: int, reason: str = "") -> None:
    """status.json of a run, as RunLog.status says."""
    write_json(run / "status.json", {"state": state, "step": step, "steps": steps, "reason": reason})


def read_log(run: Path) -> list[dict]:
    """The lines of RUN/log.jsonl. Lines that are damaged or cut (such as the last one of a killed process) are skipped,
    and their number is printed."""
    path = run / "log.jsonl"
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line for line in map(_parsed, texts) if line is not None]
    if cut := sum(bool(text.strip()) for text in texts) - len(lines):
        print(f"{path}: {cut} line(s) cut or damaged, and left out", flush=True)
    return lines


def held_out_losses(run: Path) -> tuple[int, dict[str, float]] | None:
    """The last step of RUN's log with held-out losses of the next token, and file stem of a checkpoint -> loss in nats:
    of the model, and of each average of its weights that was kept. None before the first validation."""
    head = "val_next_token"
    for line in reversed(read_log(run)):
        losses = {key.removeprefix(f"{head}_") if key != head else "model": value for key, value in line.items()
                  if (key == head or key.startswith(f"{head}_")) and isinstance(value, float)}  # fmt: skip
        if losses:
            return line["step"], losses
    return None


def _parsed(text: str) -> dict | None:
    """A parsed line of a log; None for a line that is damaged or cut."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
