"""Images to be measured, all of one size and read in batches: from a data source (such as a folder), an npz, or the
sampler itself. Each class here has

count, height, width
read(start, stop)   uint8 (stop - start, 3, H, W): these images in index order, on the CPU
labels              int64 (count,) or None, with `class_names`
describe()          its part of the protocol block
key()               changes whenever the images may have changed; cached features are named after it
prefetch            whether read may run in a second thread
stream(spans)       optional: as `in_order`, for a source that is faster at it than by one read after another
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mutor_vision.data import images
from mutor_vision.data.folder import ImageTree
from mutor_vision.data.reading import open_source
from mutor_vision.errors import DataError, IntegrityError, MismatchError, UserError
from mutor_vision.features.extractors import resize
from mutor_vision.features.moments import read_protocol
from mutor_vision.storage.files import map_array
from mutor_vision.storage.npz import Npz, check_image_array

READERS = 8  # decoding threads; Pillow releases Python's lock
PEEKED = 64  # images whose range of values is checked before the work begins
LARGEST_CLASS = 99_999  # highest class id that is accepted: results have an entry for every class up to the highest


class Images(Protocol):
    """What the top of this file describes."""

    count: int
    height: int
    width: int
    class_names: tuple[str, ...]

    @property
    def prefetch(self) -> bool: ...
    @property
    def labels(self) -> Tensor | None: ...
    def read(self, start: int, stop: int) -> Tensor: ...
    def describe(self) -> dict: ...
    def key(self) -> str: ...


class SourceImages:
    """Every image of a data source; of a folder, any image below it (data.folder.ImageTree). image_size > 0 cuts and
    resizes all to that size by ADM's centre crop.

    Raises DataError for a folder without an image and IntegrityError for lossy files without `allow_lossy`, palette
    files, mixed sizes, and a gap in a numbered sequence."""

    prefetch = True

    def __init__(self, data: str | Path, *, image_size: int = 0, allow_lossy: bool = False):
        self.source = open_source(data, ImageTree)
        self.path = Path(data)
        self.image_size = image_size
        self.allow_lossy = allow_lossy
        self.count = len(self.source)
        self.height, self.width, self.lossy = self._check_headers()
        self.labels = None if self.source.labels is None else torch.tensor(self.source.labels)
        self.class_names = tuple(self.source.class_names)

    def read(self, start: int, stop: int) -> Tensor:
        with ThreadPoolExecutor(READERS) as pool:
            return torch.stack(list(pool.map(self._read_one, range(start, stop))))

    def describe(self) -> dict:
        return {
            "source": self.source.kind, "path": self.path.name, "files": "lossy" if self.lossy else "lossless",
            "centre_crop": self.image_size or None, "classes": len(self.class_names) or None,
            "left_out": self.source.left_out, "ignored": self.source.ignored,
        }  # fmt: skip

    def key(self) -> str:
        digest = hashlib.sha256(os.fsencode(f"{self.path.resolve()} {self.image_size};"))
        digest.update(self.source.stamp())
        return digest.hexdigest()

    def _read_one(self, index: int) -> Tensor:
        image = self.source.open(index)
        if self.image_size:
            image = images.center_crop(image, self.image_size)
        if image.size != (self.width, self.height):
            raise IntegrityError(f"{self.source.shown(index)} has changed its size to {image.size} while read")
        return images.to_tensor(image)

    def _check_headers(self) -> tuple[int, int, bool]:
        # Headers cost 0.1 ms each: much cheaper than finding image 40,000 of another size after an hour.
        headers = self.source.check(range(self.count))
        lossy = [index for index, header in enumerate(headers) if header.lossy]
        if lossy and not self.allow_lossy:
            raise IntegrityError(
                f"{self.source.shown(lossy[0])} and {len(lossy) - 1} more of {self.count} files are JPEG or WEBP, "
                "whose loss shifts every metric; use PNG or npz, or pass --allow-lossy, which is recorded"
            )
        for index, header in enumerate(headers):
            if header.mode == "P" and not self.allow_lossy:
                raise IntegrityError(
                    f"{self.source.shown(index)} has a palette of 256 colours, so pixels were lost; save RGB, or pass "
                    "--allow-lossy, which is recorded"
                )
        if self.image_size:
            return self.image_size, self.image_size, bool(lossy)
        first = headers[0].size
        for index, size in enumerate(header.size for header in headers):
            if size != first:
                raise IntegrityError(
                    f"{self.source.shown(index)} (index {index}) is {size[0]}x{size[1]}, the images before it "
                    f"{first[0]}x{first[1]}; give images of one size, or pass --image-size to centre-crop all"
                )
        return first[1], first[0], bool(lossy)


class NpzImages:
    """`arr_0` of an npz, streamed. Labels: `arr_1` (N,) where the file has it."""

    prefetch = True

    def __init__(self, npz: Npz, *, nchw: bool = False, image_size: int = 0):
        self.npz = npz
        self.path = npz.path
        self.nchw = nchw
        self.image_size = image_size
        self.count, self.height, self.width = check_image_array(npz, nchw)
        protocol = read_protocol(npz) or {}
        self.class_names = tuple(protocol.get("class_names", ()))
        self.labels = None
        if "arr_1" in npz.arrays and npz.arrays["arr_1"].dtype.kind in "iu":
            # Checked before it is read, because a small compressed file can unpack to a huge array.
            check_labels_header(npz.arrays["arr_1"], self.count, f"{npz.path}: arr_1")
            self.labels = check_labels(npz.read("arr_1"), self.count, f"{npz.path}: arr_1")
        if self.count:
            with npz.rows("arr_0") as read:
                first = self._as_uint8(read(0, min(self.count, PEEKED)))
            if first.max() <= 1:
                raise IntegrityError(
                    f"{npz.path}: no value of the first {len(first)} images is above 1; it looks like 0 to 1 cast "
                    "to uint8. Multiply by 255 first"
                )
        if image_size:
            self.height = self.width = image_size
        self._rows: Callable[[int, int], np.ndarray] | None = None
        self._context: AbstractContextManager[Callable[[int, int], np.ndarray]] | None = None

    def read(self, start: int, stop: int) -> Tensor:
        if self._rows is None:  # kept open: compressed members can only be read forward
            self._context = self.npz.rows("arr_0")
            self._rows = self._context.__enter__()
        found = torch.from_numpy(self._as_uint8(self._rows(start, stop)).copy())
        found = found if self.nchw else rearrange(found, "b h w c -> b c h w").contiguous()
        if self.image_size:
            crops = [images.center_crop(images.to_pil(image), self.image_size) for image in found]
            found = torch.stack([images.to_tensor(crop) for crop in crops])
        return found

    def _as_uint8(self, values: np.ndarray) -> np.ndarray:
        """Other integer types are accepted when all values are 0 to 255: np.array makes int64 of a list of pixels."""
        if values.dtype != np.uint8 and values.size and not (0 <= values.min() and values.max() <= 255):
            raise IntegrityError(
                f"{self.path}: images are {values.dtype} from {values.min()} to {values.max()}, expected 0 to 255; "
                "write samples as uint8"
            )
        return values.astype(np.uint8, copy=False)

    def describe(self) -> dict:
        return {
            "source": "npz", "path": self.path.name, "files": "lossless", "centre_crop": self.image_size or None,
            "classes": None if self.labels is None else int(self.labels.max()) + 1,
        }  # fmt: skip

    def key(self) -> str:
        state = self.path.stat()
        text = f"{self.path.resolve()} {state.st_size} {state.st_mtime_ns} {self.image_size} {self.nchw}"
        return hashlib.sha256(text.encode()).hexdigest()


class RunImages:
    """Images sampled from a trained model when they are read; none is written to disk. Image i has label `labels[i]` of
    a seeded plan ('balanced' or 'random') and does not depend on the number of processes. image_size > 0 resizes the
    images (bicubic, antialias), such as to compare a 384-pixel model at 256. batch: images sampled at once; 0 = by free
    memory, which is a collective call."""

    height: int
    width: int
    prefetch = False  # sampling in a second thread would compete with the extractor for the device

    def __init__(
        self, loaded, count: int, settings, *, plan: str = "balanced", seed: int = 0, image_size: int = 0,
        batch: int = 0,
    ):  # fmt: skip
        from mutor_vision.sampling.stream import default_batch_size, label_plan

        if count < 2:
            raise UserError(f"--num is {count}, expected 2 or more images")
        self.loaded, self.count, self.settings, self.plan, self.seed = loaded, count, settings, plan, seed
        self.image_size = image_size
        self.class_names = tuple(loaded.class_names)
        self.labels = label_plan(count, loaded.config.model.num_classes, plan, seed)
        self.height, self.width = (image_size, image_size) if image_size else loaded.image_size
        self.batch = batch or default_batch_size(loaded)

    def read(self, start: int, stop: int) -> Tensor:
        return next(self.stream([(start, stop)]))

    def stream(self, spans: list[tuple[int, int]]) -> Iterator[Tensor]:
        """The images of each span, sampled `batch` at once however long the spans are."""
        from mutor_vision.sampling.stream import sample_batches

        wanted = np.concatenate([np.arange(*span) for span in spans])
        batches = (wanted[first : first + self.batch] for first in range(0, len(wanted), self.batch))
        sampled = sample_batches(self.loaded, self.labels, batches, self.settings, self.seed)
        ready = torch.empty(0, 3, *self.loaded.image_size, dtype=torch.uint8)
        for start, stop in spans:
            while len(ready) < stop - start:
                ready = torch.cat([ready, next(sampled)[1]])
            found, ready = ready[: stop - start], ready[stop - start :]
            yield resize(found, self.image_size) if self.image_size else found

    def describe(self) -> dict:
        return {
            "source": "sampler", "model": self.loaded.identity, "decoding": self.loaded.decoding,
            "settings": dataclasses.asdict(self.settings),
            "labels": self.plan, "seed": self.seed, "classes": len(self.class_names) or None,
            "uint8": "clamp(127.5 x + 128), truncated", "resized_to": self.image_size or None,
        }  # fmt: skip

    def key(self) -> str:
        text = json.dumps(self.describe() | {"count": self.count}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def in_order(source, spans: list[tuple[int, int]]) -> Iterator[Tensor]:
    """The images of each span [start, stop) of a source, uint8 (stop - start, 3, H, W). A source with `stream` makes
    them in batches of its own; of others the next span is read in a second thread while the caller works."""
    if not spans:
        return
    if hasattr(source, "stream"):
        yield from source.stream(spans)
    elif source.prefetch:
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(source.read, *spans[0])
            for span in spans[1:]:
                found, coming = coming.result(), reader.submit(source.read, *span)
                yield found
            yield coming.result()
    else:
        for span in spans:
            yield source.read(*span)


def check_labels_header(header, count: int, what: str) -> None:
    """Raise IntegrityError unless an array of this shape and dtype can be the class ids of `count` images."""
    if len(header.shape) != 1 or header.dtype.kind not in "iu":
        raise IntegrityError(f"{what} is {header.dtype} {header.shape}, expected class ids from 0, one per image")
    if header.shape[0] != count:
        raise IntegrityError(f"{what} has {header.shape[0]} labels for {count} images; give one per image")


def check_labels(labels: np.ndarray, count: int, what: str) -> Tensor:
    """Class ids (count,) as int64. Raises IntegrityError unless they are integers from 0 to LARGEST_CLASS."""
    check_labels_header(labels, count, what)
    if labels.size and not (0 <= labels.min() and labels.max() <= LARGEST_CLASS):
        raise IntegrityError(f"{what} has class ids from {labels.min()} to {labels.max()}, expected 0 to "
                             f"{LARGEST_CLASS:,} at most")  # fmt: skip
    return torch.from_numpy(labels.astype(np.int64))


def read_labels(path: str | Path, count: int) -> Tensor:
    """Class ids from an .npy file (N,)."""
    if not Path(path).exists():
        raise DataError(f"labels {path} do not exist; expected an .npy file of {count} class ids")
    labels = map_array(Path(path))
    return check_labels(labels, count, f"labels {path}")


def check_count(source, expected: int, by: object = "--num") -> None:
    """Raise MismatchError unless a source has exactly `expected` images, which name its result; 0 = any number. by: who
    says so."""
    if expected and source.count != expected:
        raise MismatchError(
            f"{source.path} has {source.count:,} images, expected exactly {expected:,} ({by}); "
            + ("remove what is of another run" if source.count > expected else "sample the missing ones")
        )
