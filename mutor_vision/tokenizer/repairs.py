"""Bad images that were replaced or removed, and whether an interrupted command may continue after that.

A command that stops at a bad image writes the image's name to bad-images-<rank>.json in its output folder. When it runs
again and images have changed, it continues if the change is limited to the classes of those bad images."""

import unicodedata
from pathlib import Path

from mutor_vision.data.source import Source
from mutor_vision.errors import ImageError
from mutor_vision.storage.files import read_json, write_json


def record_bad(out: Path, source: Source, error: ImageError, rank: int = 0) -> None:
    """Add the images of `source` that an error is about to the record in `out`."""
    path = out / f"bad-images-{rank}.json"
    known = read_json(path, [str]) if path.is_file() else []
    write_json(path, sorted({*known, *source.names_of(error)}))


def recall_bad(out: Path) -> list[str]:
    """The recorded images of all ranks, as Source.names_of names them."""
    return sorted({bad for path in out.glob("bad-images-*.json") for bad in read_json(path, [str])})


def forget_bad(out: Path) -> None:
    for path in out.glob("bad-images-*.json"):
        path.unlink()


def only_repaired(bad: list[str], before: list[str], now: list[str], class_names: list[str]) -> bool:
    """Whether every class that has changed had a bad image. before, now: Source.fingerprints_of_classes."""
    touched = {unicodedata.normalize("NFC", path.partition("/")[0]) for path in bad}
    return len(before) == len(now) and all(
        old == new or name in touched for old, new, name in zip(before, now, class_names, strict=True)
    )
