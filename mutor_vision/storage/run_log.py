"""The log of a training run: log.jsonl, status.json, and TensorBoard when it is installed."""

import json
from pathlib import Path

from mutor_vision.storage.files import write_json, written


class RunLog:
    """Writes on one rank; on the others every call does nothing.

    Opening it for a run that continues after `step` drops the lines that a killed process wrote beyond that step, so
    log.jsonl has each step once.
    """

    def __init__(self, run: Path, step: int, steps: int, *, active: bool):
        self.run, self.steps, self.active, self.tensorboard = run, steps, active, None
        if not active:
            return
        path = run / "log.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if (found := _parsed(line)) and found["step"] <= step]
        with written(path) as partial:
            partial.write_text("".join(line + "\n" for line in kept))
        self.file = open(path, "a", buffering=1)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.tensorboard = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """One line of numbers at an optimizer step."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def status(self, state: str, step: int, reason: str = "") -> None:
        """status.json: 'running', 'done', 'failed' or 'preempted', at which of how many steps and why."""
        if self.active:
            status = {"state": state, "step": step, "steps": self.steps, "reason": reason}
            write_json(self.run / "status.json", status)

    def failed(self, step: int, error: BaseException) -> None:
        """status.json: an error ended the run at `step`; an error that is none says in `state` what it is."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.status(getattr(error, "state", "failed"), step, reason)

    def close(self) -> None:
        if self.active:
            self.file.close()
            if self.tensorboard:
                self.tensorboard.close()


def read_log(run: Path) -> list[dict]:
    """The lines of RUN/log.jsonl. Lines that are damaged or cut (such as the last one of a killed process) are skipped,
    and their number is printed."""
    path = run / "log.jsonl"
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line for line in map(_parsed, texts) if line is not None]
    if cut := sum(bool(text.strip()) for text in texts) - len(lines):
        print(f"{path}: {cut} line(s) cut or damaged, and left out", flush=True)
    return lines


def _parsed(text: str) -> dict | None:
    """A parsed line of a log; None for a line that is damaged or cut."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
