"""Folders of images, one sub-folder a class: listing them, and reading them in worker processes."""

import dataclasses
import functools
import hashlib
import os
import signal
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from mutor_vision.errors import DataError, ImageError, UserError
from mutor_vision.images import EXTENSIONS, Header, center_crop, check_image, random_crop, read_image, to_tensor
from mutor_vision.keyed_random import permutation, uniforms
from mutor_vision.listing import Listing, list_folders, list_images, say_left_out
from mutor_vision.names import printable

READERS = 8  # threads that look at images
SHOWN = 10  # bad images that one message names
PATIENCE = 600  # seconds that a batch may take to be read
_CURE = "use fewer workers, or none (--workers 0, --set workers=0); in a container, more --shm-size"
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


class TrainingCrops(Dataset):
    """Position k of training -> uint8 (3, size, size): image `permutation(epoch)[k % n]` with a crop keyed by k, so
    that k alone says what step, process and restart would read. indices are the images of `folder` to train on."""

    def __init__(self, folder: ImageFolder, indices: np.ndarray, size: int, seed: int, min_scale: float):
        self.folder, self.indices, self.size, self.seed, self.min_scale = folder, indices, size, seed, min_scale
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, k: int) -> Tensor:
        epoch, place = divmod(k, len(self.indices))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, "order", epoch, len(self.indices))
        image = read_image(self.folder.root / self.folder.paths[self.indices[self._order[place]]])
        if self.min_scale == 1:
            return to_tensor(center_crop(image, self.size))
        draws = uniforms(self.seed, "crop", np.array([k]), 4)[0]
        return to_tensor(random_crop(image, self.size, draws, self.min_scale))


class Views(Dataset):
    """Image number i of a folder -> uint8 (views, 3, size, size), cut by `crops`: (image, size) -> list of images."""

    def __init__(self, folder: ImageFolder, size: int, crops: Callable[[Image.Image, int], list[Image.Image]]):
        self.folder, self.size, self.crops = folder, size, crops

    def __getitem__(self, i: int) -> Tensor:
        image = read_image(self.folder.root / self.folder.paths[i])
        return torch.stack([to_tensor(view) for view in self.crops(image, self.size)])


def read_batches(dataset: Dataset, batches: Iterable[Iterable[int]], workers: int) -> Iterator[Tensor]:
    """The items of `dataset` at each batch's indices, stacked, in order, read ahead by `workers` processes (0 = none).
    Raises the DataError of an unreadable image here, as one clear line, not as a worker's traceback; UserError when
    the workers cannot be started, one dies, or none delivers for PATIENCE seconds."""
    if workers < 0:
        raise UserError(f"workers is {workers}, expected 0 or more")
    loader = DataLoader(
        _ErrorsAsItems(dataset), batch_sampler=batches, num_workers=workers, collate_fn=_stack,
        pin_memory=torch.cuda.is_available(), timeout=PATIENCE if workers else 0,
    )  # fmt: skip
    try:
        if workers:
            torch.multiprocessing.Queue().close()  # tried by itself: half a loader complains when it is thrown away
        stream = iter(loader)
    except OSError as error:
        raise UserError(f"{workers} reading processes cannot be started ({error}); {_CURE}") from None
    with _deaths() as heard_here:
        while True:
            failure = None
            try:
                with heard_here:
                    batch = next(stream, None)
            except (RuntimeError, OSError, EOFError) as error:  # the last two where one died while handing a batch over
                failure = _worker_failure(error) if workers else error
            if failure is not None:
                raise failure
            if batch is None:
                return
            if isinstance(batch, UserError):
                raise batch
            yield torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch


def _worker_failure(error: Exception) -> Exception:
    """What is raised when a worker died or delivers nothing -> the one line of it; any other error stays."""
    text = " ".join(f"{error}".split()) or type(error).__name__
    if isinstance(error, RuntimeError) and not text.startswith(("DataLoader worker", "DataLoader timed out")):
        return error
    return UserError(
        f"the processes that read images failed: {text} A killed one was often short of memory, and one that delivers "
        f"nothing waits for its disk; {_CURE}"
    )


class _Deaths:
    """torch's handler of SIGCHLD raises wherever the main thread is when a worker dies. This one raises inside its own
    context only, and on entering that what it was told before. The handler is called at once in any case: it can tell
    that a worker has died only until the process is waited for, which starting another one does."""

    def __init__(self, handler):
        self.handler, self.here, self.told, self.readers = handler, False, None, 0

    def __call__(self, number, frame):
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            if self.here:
                raise
            self.told = error

    def __enter__(self):
        self.here, told, self.told = self.told is None, self.told, None
        if told is not None:
            raise told

    def __exit__(self, *_):
        self.here = False


@contextmanager
def _deaths() -> Iterator[AbstractContextManager]:
    """While batches are read: the context in which the next is waited for."""
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield nullcontext()
        return
    if not isinstance(handler, _Deaths):
        signal.signal(signal.SIGCHLD, handler := _Deaths(handler))
    if handler.readers == 0:
        handler.told = None  # of a worker whose reader has ended
    handler.readers += 1
    try:
        yield handler
    finally:
        handler.readers -= 1


def batched(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Slices of at most `size` indices, in order."""
    return (indices[start : start + size] for start in range(0, len(indices), size))


def check_apart(data: str | Path, out: str | Path) -> None:
    """Raise UserError when one folder contains the other: results among the images would become a class."""
    source, target = Path(data).resolve(), Path(out).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UserError(f"output {out} and images {data} lie in one another; give folders apart")


class _ErrorsAsItems(Dataset):
    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Tensor | UserError:
        try:
            return self.dataset[index]
        except UserError as error:
            return error


def _stack(items: list[Tensor | UserError]) -> Tensor | np.ndarray | UserError:
    errors = [item for item in items if isinstance(item, UserError)]
    if errors:
        return errors[0]
    batch = torch.stack(items)
    if get_worker_info() is None:
        return batch
    try:
        return batch.share_memory_()
    except (RuntimeError, OSError):  # /dev/shm is full: a container has 64 MB. An array travels through a pipe instead
        return batch.numpy()
