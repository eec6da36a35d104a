"""Images that are parts of larger files. What tar archives and parquet files have in common with a folder.

Every image has a key, 'CLASS/NAME', by which it would lie in a folder, and images are ordered as a folder's are: by
class, then by the folder in which the key lies, then by name. So the same images give the same token set in every form.
"""

import functools
import glob
import hashlib
import os
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mutor_vision.data.folder import looked_at
from mutor_vision.data.images import Header, check_image, read_image
from mutor_vision.data.listing import Listing, most_first, say_left_out
from mutor_vision.data.source import Source, raise_all
from mutor_vision.errors import DataError, ImageError, IntegrityError
from mutor_vision.names import printable, read_names

MOST_CLASSES = 100_000  # where labels are numbers, of which a single one may say a billion
CLASSES = "classes.txt"  # beside the files: a class name a line, where labels are numbers
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Packed(Source):
    """A kind sets `files` and calls `_set`; it gives the bytes of an image by the place that it has told `_set`."""

    files: list[Path]

    def _set(self, keys: list[str], labels: Sequence[int], places: np.ndarray, class_names: Sequence[str]) -> None:
        """places (n, 3) int64: the number of the file, where in it, and the image's size in bytes."""
        if not keys:
            raise DataError(f"{self.files[0]} holds no image")
        if absent := sorted(set(range(len(class_names))) - set(labels)):
            raise DataError(f"class '{printable(class_names[absent[0]])}' of {self.files[0]} has no image; add "
                            "some, or take its name away")  # fmt: skip
        order = sorted(range(len(keys)), key=lambda i: (labels[i], *os.path.split(keys[i])))
        self.keys, self.labels = [keys[i] for i in order], [int(labels[i]) for i in order]
        self.class_names, self._places = class_names, places[order]
        if twice := [key for key, times in Counter(keys).items() if times > 1]:
            raise IntegrityError(f"{self.files[0]} has two images of the name {printable(twice[0])}; name them apart")

    @abstractmethod
    def content(self, file: int, place: int, size: int) -> bytes:
        """The bytes of an image."""

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, number: int) -> Image.Image:
        return read_image(self.shown(number), self.content(*self._places[number].tolist()))

    def fingerprint(self, numbers: Sequence[int] | None = None) -> str:
        """As a folder's of the same files."""
        digest = hashlib.sha256()
        for number in range(len(self)) if numbers is None else numbers:
            digest.update(os.fsencode(f"{self.keys[number]}\0{self._places[number, 2]}\n"))
        return digest.hexdigest()

    def check(self, numbers: Sequence[int]) -> list[Header]:
        found = looked_at(self._header, numbers)
        raise_all([each for each in found if isinstance(each, ImageError)], len(numbers))
        return [each for each in found if not isinstance(each, ImageError)]

    def _header(self, number: int) -> Header:
        return check_image(self.shown(number), self.content(*self._places[number].tolist()))

    def shown(self, number: int) -> str:
        return f"{self.files[self._places[number, 0]]}: {self.keys[number]}"

    def names_of(self, error: ImageError) -> list[str]:
        starts = [f"{file}: " for file in self.files]
        return [path.removeprefix(start) for path in error.paths for start in starts if path.startswith(start)]

    def stamp(self) -> bytes:
        states = ((file, file.stat()) for file in self.files)
        return b"".join(os.fsencode(f"{file} {state.st_size} {state.st_mtime_ns};") for file, state in states)

    def _say(self, left_out: Counter, ignored: Counter) -> None:
        self.left_out, self.ignored = most_first(left_out), most_first(ignored)
        say_left_out(self.files[0], Listing([], self.left_out, self.ignored))


def matching(pattern: str) -> list[Path]:
    """A name with '{000..012}' or with * ? [] -> the files that it means, in order. Raises DataError where one is
    missing or none is there."""
    if braces := _BRACES.search(pattern):
        first, last = braces.groups()
        numbers = range(int(first), int(last) + 1)
        paths = [f"{pattern[: braces.start()]}{n:0{len(first)}d}{pattern[braces.end() :]}" for n in numbers]
    else:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
    if not paths:
        raise DataError(f"{pattern} names no file; check the name")
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise DataError(f"{missing[0]} is no file ({len(missing)} of {len(paths)} are missing); complete them")
    return list(map(Path, paths))


def names_of_numbers(folder: Path, labels: Sequence[int], names: Sequence[str] = ()) -> list[str]:
    """Class names where labels are numbers: those given, else of classes.txt in `folder`, else the numbers. Raises
    DataError for a label outside."""
    if not names and (folder / CLASSES).is_file():
        names = read_names(folder / CLASSES)
    if not names:
        names = [str(number) for number in range(min(max(labels, default=-1) + 1, MOST_CLASSES))]
    if outside := [label for label in labels if not 0 <= label < len(names)]:
        raise DataError(
            f"{folder} has the label {outside[0]}, expected 0 to {len(names) - 1}: there are {len(names)} names"
        )
    return list(names)


@functools.cache
def natural_name(pattern: str) -> str:
    """What manifests call the images of a pattern: 'train' of 'data/train-{000..012}.tar'."""
    stem = Path(_BRACES.sub("", pattern)).name.split(".")[0]
    return re.sub(r"[*?\[\]]", "", stem).strip("-_") or Path(pattern).absolute().parent.name
