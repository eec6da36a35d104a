"""Bad images that were replaced or removed, and whether an interrupted command may continue after that.

A command that stops at a bad image writes the image's name to bad-images-<rank>.json in its output folder. When it runs
again and images have changed, it continues if the change is limited to the classes of those bad images."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch

from mutor_vision.data.source import SHOWN, Source, Without, raise_all
from mutor_vision.errors import ImageError
from mutor_vision.runtime import Runtime
from mutor_vision.storage.files import read_json, write_json, written


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


def only_repaired(bad: list[str], before: list[str], now: list[str], class_names: Sequence[str]) -> bool:
    """Whether every class that has changed had a bad image. before, now: Source.fingerprints_of_classes."""
    touched = {unicodedata.normalize("NFC", path.partition("/")[0]) for path in bad}
    return len(before) == len(now) and all(
        old == new or name in touched for old, new, name in zip(before, now, class_names, strict=True)
    )


def without_bad(source: Source, out: Path, at_most: int, verify: bool, suspects: list[str], runtime: Runtime) -> Source:
    """Collective. The source without its images that cannot be used, if there are at most `at_most`; else ImageError.

    Headers of all images are looked at; `verify` decodes all. suspects: images, as Source.names_of names them, that are
    decoded in any case, because damage in them showed in decoding before."""
    if not at_most and not verify:
        return source  # the commands check what they still need
    dropped, error = {}, None
    marks = torch.zeros(len(source), dtype=torch.int64, device=runtime.device)
    if runtime.is_main:
        dropped = source.bad(range(len(source)), decode=verify) | source.bad(source.numbers_of(suspects), decode=True)
        marks[list(dropped)] = 1
        if len(dropped) > at_most:
            try:
                raise_all(list(dropped.values()), len(source))
            except ImageError as raised:
                error = listed(raised, out)
        elif dropped:
            print(f"{len(dropped)} image(s) of {len(source):,} cannot be used and are skipped", flush=True)
    runtime.raise_together(error)
    marks = runtime.all_reduce(marks)
    numbers = marks.nonzero().flatten().tolist()
    return Without(source, {number: dropped.get(number, ImageError("")) for number in numbers}) if numbers else source


def listed(error: ImageError, out: Path) -> ImageError:
    """The error; where it shows only some of its images, with the name of a file beside `out` that lists all."""
    if len(error.lines) <= SHOWN:
        return error
    path = out.with_name(out.name + ".bad-images.txt")
    with written(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in error.lines), encoding="utf-8")
    return ImageError(f"{error}; all of them: {path}", *error.paths)
