"""Folders of images as sources: one sub-folder a class for training, or any tree of images to be measured."""

import dataclasses
import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

from PIL import Image

from mutor_vision.data.images import EXTENSIONS, Header, check_image, read_image
from mutor_vision.data.listing import Listing, list_folders, list_images, say_left_out
from mutor_vision.data.source import Source, raise_all
from mutor_vision.errors import DataError, ImageError, IntegrityError, UserError
from mutor_vision.names import printable
from mutor_vision.progress import progress

READERS = 8  # threads that read image headers
Key = TypeVar("Key")  # what stands for an image: its path, its number
T = TypeVar("T")
OUTSIDE = "images outside of the class folders"


class Files(Source):
    """Images that are files below one folder. paths: of each image in order, relative to root, with '/'."""

    kind = "folder"

    def __init__(self, root: str | Path, paths: list[str], listing: Listing):
        self.root, self.paths = Path(root), paths
        self.name = self.root.resolve().name
        self.left_out, self.ignored = listing.left_out, listing.ignored
        say_left_out(self.root, listing)

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, number: int) -> Image.Image:
        return read_image(self.root / self.paths[number])

    def fingerprint(self, numbers: Sequence[int] | None = None) -> str:
        """sha256 over each file's relative path and size in bytes. Contents are not read: for ImageNet that would take
        minutes."""
        digest = hashlib.sha256()
        for number in range(len(self)) if numbers is None else numbers:
            digest.update(os.fsencode(f"{self.paths[number]}\0{self._sizes[number]}\n"))
        return digest.hexdigest()

    def check(self, numbers: Sequence[int]) -> list[Header]:
        return check_images([self.root / self.paths[number] for number in numbers])

    def bad(self, numbers: Sequence[int], decode: bool) -> dict[int, ImageError]:
        found = looked_at(_decoded if decode else check_image, [self.root / self.paths[number] for number in numbers])
        return {number: it for number, it in zip(numbers, found, strict=True) if isinstance(it, ImageError)}

    def shown(self, number: int) -> str:
        return printable(str(self.root / self.paths[number]))

    def names_of(self, error: ImageError) -> list[str]:
        inside = (Path(path) for path in error.paths if Path(path).is_relative_to(self.root))
        return [path.relative_to(self.root).as_posix() for path in inside]

    def numbers_of(self, names: Sequence[str]) -> list[int]:
        wanted = set(names)
        return [number for number, path in enumerate(self.paths) if path in wanted]

    def stamp(self) -> bytes:
        states = ((path, (self.root / path).stat()) for path in self.paths)
        return b"".join(os.fsencode(f"{path} {state.st_size} {state.st_mtime_ns};") for path, state in states)

    @functools.cached_property
    def _sizes(self) -> list[int]:
        """Bytes of every file, asked of the disk once: fingerprints are of all, of each class, and of each shard."""
        return [_size(self.root / path) for path in self.paths]


class ImageFolder(Files):
    """root/<class>/**/<image>, in an order that depends on the names alone. Labels number the class folders in sorted
    order, as torchvision's ImageFolder does; names are compared in their composed Unicode form, so that a copy that
    macOS made has the same classes.

    Lists the folder without opening an image, and says in one line what is not taken for one (`listing`). Raises
    DataError when it is missing, a file, without class folders, or has a class without an image."""

    def __init__(self, root: str | Path):
        root = Path(root)
        folders, listing = list_folders(root), list_images(root)
        loose = sum("/" not in path for path in listing.paths)
        if not folders:
            found = "images directly in it and no class folders" if loose else "no class folders"
            raise DataError(f"{root} has {found}; expected one sub-folder of images for each class")
        if loose:
            listing = dataclasses.replace(listing, left_out=listing.left_out | {OUTSIDE: loose})
        names = {folder: unicodedata.normalize("NFC", folder) for folder in folders}
        self.class_names = sorted(set(names.values()))
        number = {name: label for label, name in enumerate(self.class_names)}
        number = {folder: number[name] for folder, name in names.items()}
        of_class: list[list[str]] = [[] for _ in self.class_names]
        for path in listing.paths:
            if "/" in path:
                of_class[number[path.partition("/")[0]]].append(path)
        self.labels = [label for label, paths in enumerate(of_class) for _ in paths]
        super().__init__(root, [path for paths in of_class for path in paths], listing)
        if len(self.class_names) < len(folders):
            twice = next(name for name in self.class_names if list(names.values()).count(name) > 1)
            raise DataError(
                f"{root} has two class folders named '{printable(twice)}' in two forms of Unicode; make one of them"
            )
        if not self.paths:
            raise DataError(f"{root} holds no image; expected files ending in {', '.join(EXTENSIONS)}")
        if empty := [folder for folder in folders if not of_class[number[folder]]]:
            raise DataError(
                f"class folder {printable(str(root / empty[0]))} holds no image ({', '.join(EXTENSIONS)}); "
                "fill it or remove it"
            )


class ImageTree(Files):
    """Every image below a folder, in natural order (2.png before 10.png), as samples are numbered. Where all of them
    lie in sub-folders, the first level is the class; else labels are None. Raises DataError for a folder without an
    image, and IntegrityError for a gap in a numbered sequence."""

    def __init__(self, root: str | Path):
        listing = list_images(root)
        names = sorted(map(PurePosixPath, listing.paths), key=_natural)
        if not names:
            raise DataError(f"{root} holds no image; looked for {', '.join(EXTENSIONS)}, at any depth")
        super().__init__(root, list(map(str, names)), listing)
        _check_numbering(self.root, names)
        self.labels, self.class_names = None, []
        if all(len(name.parts) > 1 for name in names):
            # In composed Unicode, as ImageFolder has them: classes are compared by name.
            folders = [unicodedata.normalize("NFC", name.parts[0]) for name in names]
            self.class_names = sorted(set(folders))
            number = {name: label for label, name in enumerate(self.class_names)}
            self.labels = [number[folder] for folder in folders]


def _check_numbering(folder: Path, names: list[PurePosixPath]) -> None:
    """A flat folder of 000000.png, 000001.png, ... must have no gap: one of its files was lost."""
    if any(len(name.parts) > 1 or not name.stem.isascii() or not name.stem.isdigit() for name in names):
        return
    numbers = sorted(int(name.stem) for name in names)
    for before, after in zip(numbers, numbers[1:], strict=False):
        if after - before > 1:
            raise IntegrityError(
                f"{folder}: image {before + 1} is missing between {before} and {after}; sample it, or rename the files"
            )


def _natural(name: PurePosixPath) -> list:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name.as_posix())]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{printable(str(path))} cannot be read ({error.strerror})") from None


def check_images(paths: Sequence[Path]) -> list[Header]:
    """images.check_image of every path, in threads (0.1 to 0.3 ms a file on a fast disk). Raises one ImageError that
    names all files that cannot be used."""
    found = looked_at(check_image, paths)
    raise_all([it for it in found if isinstance(it, ImageError)], len(paths))
    return [it for it in found if not isinstance(it, ImageError)]


def looked_at(look: Callable[[Key], T], images: Sequence[Key]) -> list[T | ImageError]:
    """What `look` gives or raises for each image, in threads."""

    def of_part(part: Sequence[Key]) -> list[T | ImageError]:
        return [_or_error(look, image) for image in part]

    number = -(-len(images) // 200)
    with ThreadPoolExecutor(READERS) as pool:
        parts = progress(
            pool.map(of_part, batched(images, 200)), desc="looking at images", total=number, delay=5, leave=False
        )
        return [found for part in parts for found in part]


def _or_error(look: Callable[[Key], T], image: Key) -> T | ImageError:
    try:
        return look(image)
    except ImageError as error:
        return error


def _decoded(path: Path) -> None:
    read_image(path)


def check_apart(data: str | Path, out: str | Path) -> None:
    """Raise UserError when one folder contains the other, because results written among the images would be read as a
    class the next time."""
    source, target = Path(os.path.realpath(data)), Path(os.path.realpath(out))  # resolve fails on a link to itself
    if source == target or source in target.parents or target in source.parents:
        raise UserError(f"output {out} and images {data} lie in one another; give folders apart")


def batched(indices: Sequence[Key], size: int) -> Iterator[Sequence[Key]]:
    """Slices of at most `size` indices, in order."""
    return (indices[start : start + size] for start in range(0, len(indices), size))
