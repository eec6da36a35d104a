"""Folders of images, one sub-folder a class."""

import dataclasses
import functools
import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mutor_vision.data.images import EXTENSIONS, Header, check_image
from mutor_vision.data.listing import Listing, list_folders, list_images, say_left_out
from mutor_vision.errors import DataError, ImageError, UserError
from mutor_vision.names import printable

READERS = 8  # threads that look at images
SHOWN = 10  # bad images that one message names
OUTSIDE = "images outside of the class folders"


@dataclass(frozen=True)
class ImageFolder:
    """root/<class>/**/<image>, in an order that depends on the names alone. Labels number the class folders in sorted
    order, as torchvision's ImageFolder does; names are compared in their composed Unicode form, so that a copy that
    macOS made has the same classes."""

    root: Path
    paths: list[str]  # relative to root, with '/'
    labels: list[int]  # of each path, in [0, len(class_names))
    class_names: list[str]  # names of the class folders, composed (NFC)
    listing: Listing = field(compare=False)  # with what was left out

    @classmethod
    def open(cls, root: str | Path) -> "ImageFolder":
        """List a folder without opening an image, and say in one line what is not taken for one (`listing`). Raises
        DataError when it is missing, a file, without class folders, or has a class without an image."""
        root = Path(root)
        folders, listing = list_folders(root), list_images(root)
        loose = sum("/" not in path for path in listing.paths)
        if not folders:
            found = "images directly in it and no class folders" if loose else "no class folders"
            raise DataError(f"{root} has {found}; expected one sub-folder of images for each class")
        if loose:
            listing = dataclasses.replace(listing, left_out=listing.left_out | {OUTSIDE: loose})
        say_left_out(root, listing)
        names = {folder: unicodedata.normalize("NFC", folder) for folder in folders}
        class_names = sorted(set(names.values()))
        if len(class_names) < len(folders):
            twice = next(name for name in class_names if list(names.values()).count(name) > 1)
            raise DataError(
                f"{root} has two class folders named '{printable(twice)}' in two forms of Unicode; make one of them"
            )
        number = {name: label for label, name in enumerate(class_names)}
        number = {folder: number[name] for folder, name in names.items()}
        of_class = [[] for _ in class_names]
        for path in listing.paths:
            if "/" in path:
                of_class[number[path.partition("/")[0]]].append(path)
        if not any(of_class):
            raise DataError(f"{root} holds no image; expected files ending in {', '.join(EXTENSIONS)}")
        if empty := [folder for folder in folders if not of_class[number[folder]]]:
            raise DataError(
                f"class folder {printable(str(root / empty[0]))} holds no image ({', '.join(EXTENSIONS)}); "
                "fill it or remove it"
            )
        labels = [label for label, paths in enumerate(of_class) for _ in paths]
        return cls(root, [path for paths in of_class for path in paths], labels, class_names, listing)

    def __len__(self) -> int:
        return len(self.paths)

    def counts(self) -> list[int]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def fingerprint(self, numbers: Sequence[int] | None = None) -> str:
        """sha256 (hex) over the relative path and size in bytes of every image, or of those numbers."""
        digest = hashlib.sha256()
        for number in range(len(self)) if numbers is None else numbers:
            digest.update(os.fsencode(f"{self.paths[number]}\0{self._sizes[number]}\n"))
        return digest.hexdigest()

    def fingerprints_of_classes(self) -> list[str]:
        """The same of each class, 16 hex digits."""
        counts = self.counts()
        ends = np.cumsum(counts)
        return [self.fingerprint(range(end - count, end))[:16] for end, count in zip(ends, counts, strict=True)]

    def check(self, numbers: Sequence[int]) -> None:
        """Raise one ImageError that names those of these images that images.check_image refuses."""
        check_images([self.root / self.paths[number] for number in numbers])

    @functools.cached_property
    def _sizes(self) -> list[int]:
        """Bytes of every file, asked of the disk once: fingerprints are of all, of each class, and of each shard."""
        return [_size(self.root / path) for path in self.paths]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{printable(str(path))} cannot be read ({error.strerror})") from None


def check_images(paths: Sequence[Path]) -> list[Header]:
    """images.check_image of every path, by threads (0.1 to 0.3 ms each from a fast disk). Raises one ImageError for all
    that cannot be used; its message names the first SHOWN."""
    headers, errors = [], []

    def look(part: Sequence[Path]) -> list[Header | ImageError]:
        return [_header_or_error(path) for path in part]

    with ThreadPoolExecutor(READERS) as pool:
        parts = tqdm(pool.map(look, batched(paths, 200)), desc="looking at images", total=-(-len(paths) // 200),
                     delay=5, leave=False, dynamic_ncols=True, disable=os.environ.get("RANK", "0") != "0")  # fmt: skip
        for found in (found for part in parts for found in part):
            (errors if isinstance(found, ImageError) else headers).append(found)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        shown = "; ".join(str(error) for error in errors[:SHOWN])
        more = f"; and {len(errors) - SHOWN:,} more" if len(errors) > SHOWN else ""
        bad = [path for error in errors for path in error.paths]
        raise ImageError(f"{len(errors):,} of {len(paths):,} images cannot be used: {shown}{more}", *bad)
    return headers


def _header_or_error(path: Path) -> Header | ImageError:
    try:
        return check_image(path)
    except ImageError as error:
        return error


def check_apart(data: str | Path, out: str | Path) -> None:
    """Raise UserError when one folder contains the other: results among the images would become a class."""
    source, target = Path(data).resolve(), Path(out).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UserError(f"output {out} and images {data} lie in one another; give folders apart")


def batched(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Slices of at most `size` indices, in order."""
    return (indices[start : start + size] for start in range(0, len(indices), size))
