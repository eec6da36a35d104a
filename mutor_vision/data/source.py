"""What a source of images is: numbered images with labels, from wherever they are kept.

A folder (`data/folder.py`) is the first kind. Another one, such as a tar archive or parquet, is a subclass of `Source`
in a file of its own and a line in `reading.SOURCES`; encoding, tokenizer training and features then read it as they
read a folder (docs/adding-a-data-source.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from mutor_vision.data.images import Header
from mutor_vision.errors import ImageError
from mutor_vision.names import printable

SHOWN = 10  # bad images that one message names


class Source(ABC):
    """Images numbered from 0, always in the same order. A kind of source sets the attributes that have no default and
    writes the three abstract methods; it may replace other methods where it knows a faster way. Its constructor takes
    the string that users write after --data. Several processes and threads call `open` at once."""

    class_names: Sequence[str]
    labels: Sequence[int] | None  # of each image, in [0, len(class_names)); None where the source has no classes
    name = "images"  # what manifests and protocols call it
    kind = "images"  # what protocols say that it is: 'folder', ...
    left_out: dict[str, int] = {}  # what in it was not taken for an image, for manifests: ending -> how many
    skipped: dict[str, str] = {}  # images that cannot be used and are not counted (Without): name -> why
    ignored: dict[str, int] = {}  # what in it a system left behind: name -> how often

    @classmethod
    def claims(cls, data: str) -> bool:
        """Whether this is the kind that a user's string means, such as one that ends in '.tar'."""
        return False

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def open(self, number: int) -> Image.Image:
        """Image `number`, decoded to RGB, at its own size. Raises ImageError with the image's name when it cannot be
        used."""

    @abstractmethod
    def fingerprint(self, numbers: Sequence[int] | None = None) -> str:
        """sha256 (hex) that changes when one of these images, their names or their order changes; None = of all images.
        It is recorded in manifests, so another machine must get the same."""

    def counts(self) -> list[int]:
        """Images of each class."""
        assert self.labels is not None
        return np.bincount(self.labels, minlength=len(self.class_names)).tolist()

    def fingerprints_of_classes(self) -> list[str]:
        """The first 16 digits of each class's fingerprint."""
        assert self.labels is not None
        of_classes = np.split(np.argsort(self.labels, kind="stable"), np.cumsum(self.counts())[:-1])
        return [self.fingerprint(numbers.tolist())[:16] for numbers in of_classes]

    def check(self, numbers: Sequence[int]) -> list[Header]:
        """The header of each of these images. Called before long work, which a bad image would stop: raises one
        ImageError that names all images that cannot be used. This default decodes every image; a kind of source that
        can read headers alone should."""
        headers, errors = [], []
        for number in numbers:
            try:
                headers.append(Header("", "RGB", self.open(number).size, lossy=False))
            except ImageError as error:
                errors.append(error)
        raise_all(errors, len(numbers))
        return headers

    def bad(self, numbers: Sequence[int], decode: bool) -> dict[int, ImageError]:
        """Number -> what is wrong, of those of these images that cannot be used. decode: also those whose header is
        fine; this default always does."""
        found = {}
        for number in numbers:
            try:
                self.open(number)
            except ImageError as error:
                found[number] = error
        return found

    def shown(self, number: int) -> str:
        """What messages call an image."""
        return f"image {number} of {self.name}"

    def names_of(self, error: ImageError) -> list[str]:
        """'CLASS/...' of the images of this source that an error is about, so that their repair can be recognised."""
        return list(error.paths)

    def numbers_of(self, names: Sequence[str]) -> list[int]:
        """The images that `names_of` calls so, as far as they are here; a superset of them, where that is simpler."""
        return list(range(len(self))) if names else []

    def stamp(self) -> bytes:
        """Bytes that change whenever an image may have changed here. Cached features are named after them."""
        return self.fingerprint().encode()


class Without(Source):
    """A source without some of its images. dropped: their numbers in it -> why. Raises ImageError when a class has no
    image left."""

    def __init__(self, source: Source, dropped: Mapping[int, ImageError]):
        self.source, self.name, self.kind = source, source.name, source.kind
        self.left_out, self.ignored, self.class_names = source.left_out, source.ignored, source.class_names
        self.skipped = {(source.names_of(error) or [source.shown(number)])[0]:
                        str(error).removeprefix(f"{source.shown(number)}: ")
                        for number, error in sorted(dropped.items())}  # fmt: skip
        self.numbers = [number for number in range(len(source)) if number not in dropped]
        self.labels = None if source.labels is None else [source.labels[number] for number in self.numbers]
        if self.labels is not None and 0 in self.counts():
            empty = self.class_names[self.counts().index(0)]
            raise ImageError(f"no image of class '{printable(empty)}' can be used; mend one, or remove the class")

    def __len__(self) -> int:
        return len(self.numbers)

    def open(self, number: int) -> Image.Image:
        return self.source.open(self.numbers[number])

    def fingerprint(self, numbers: Sequence[int] | None = None) -> str:
        return self.source.fingerprint([self.numbers[i] for i in (range(len(self)) if numbers is None else numbers)])

    def check(self, numbers: Sequence[int]) -> list[Header]:
        return self.source.check([self.numbers[number] for number in numbers])

    def shown(self, number: int) -> str:
        return self.source.shown(self.numbers[number])

    def names_of(self, error: ImageError) -> list[str]:
        return self.source.names_of(error)

    def stamp(self) -> bytes:
        return self.source.stamp() + repr(self.numbers).encode()


def raise_all(errors: Sequence[ImageError], looked_at: int) -> None:
    """Raise one ImageError for all of these, if there are any; its message shows the first SHOWN."""
    if not errors:
        return
    if len(errors) == 1:
        raise errors[0]
    shown = "; ".join(str(error) for error in errors[:SHOWN])
    more = f"; and {len(errors) - SHOWN:,} more" if len(errors) > SHOWN else ""
    bad = [path for error in errors for path in error.paths]
    together = ImageError(f"{len(errors):,} of {looked_at:,} images cannot be used: {shown}{more}", *bad)
    together.lines = tuple(map(str, errors))
    raise together
