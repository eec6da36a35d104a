"""Where a run is shown beside its log.jsonl: TensorBoard, Weights & Biases, trackio. Each takes numbers, pictures and
the configuration; log.jsonl is written whatever they do."""

import importlib
import importlib.util
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from mutor_vision.errors import UserError

TRACKERS = ("tensorboard", "wandb", "trackio")
_ID = "tracker-id.txt"  # in the run directory: under which name it goes on where it is shown


class Tracker(Protocol):
    def numbers(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None:
        """A PNG file."""

    def close(self) -> None: ...


class TensorBoard:
    """Files in RUN/tensorboard."""

    def __init__(self, run: Path, step: int, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)
        if config:
            self.writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", step)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """wandb, or trackio, which has the same calls. A run that continues goes on under its old name."""

    def __init__(self, module: ModuleType, run: Path, config: dict[str, Any]):
        self.module, path = module, run / _ID
        if not path.is_file():
            path.write_text(f"{run.resolve().name}-{uuid.uuid4().hex[:8]}\n")
        name = path.read_text().strip()
        own = {"id": name, "dir": str(run)} if module.__name__ == "wandb" else {}
        module.init(project="mutor-vision", name=name, config=config, resume="allow", **own)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.module.log({name: self.module.Image(str(path))}, step=step)

    def close(self) -> None:
        self.module.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a name that is none, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"tracker is '{name}', expected one of {', '.join(TRACKERS)}")
        if not _installed(name):
            raise UserError(f"tracker {name} is not installed; pip install 'mutor-vision[{name}]', or leave it out")


def open_trackers(names: Sequence[str], run: Path, step: int, config: dict[str, Any]) -> list[Tracker]:
    """Those named, and TensorBoard, which stays on this disk, wherever it is installed. step: the run's last one."""
    made: list[Tracker] = [TensorBoard(run, step, config)] if _installed("tensorboard") else []
    hosted = (name for name in dict.fromkeys(names) if name != "tensorboard")
    return made + [Hosted(importlib.import_module(name), run, config) for name in hosted]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a specification, which was put in its place
        return True
