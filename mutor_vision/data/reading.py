"""Images read: which source a user's string means, and the worker processes that read from it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mutor_vision.data.folder import ImageFolder
from mutor_vision.data.images import center_crop, random_crop, to_tensor
from mutor_vision.data.parquet import ParquetImages
from mutor_vision.data.source import Source
from mutor_vision.data.tar import TarImages
from mutor_vision.errors import UserError
from mutor_vision.keyed_random import permutation, uniforms
from mutor_vision.storage import lock

PATIENCE = 600  # seconds that a batch may take to be read
# Kinds beside folders, asked in this order whether they claim what a user wrote.
SOURCES: list[type[Source]] = [TarImages, ParquetImages]
_CURE = "use fewer workers, or none (--workers 0, --set workers=0); in a container, more --shm-size"


def source_kind(data: str | Path) -> type[Source] | None:
    """The kind of source that claims a user's string; None where it means a folder, or nothing that exists."""
    return next((kind for kind in SOURCES if kind.claims(str(data))), None)


def open_source(data: str | Path, folder: type[Source] = ImageFolder) -> Source:
    """The source that a user's string means. folder: how it is read where it is one: ImageFolder (a class for every
    image, in the order of classes) or ImageTree (any images, in natural order). Raises DataError when there is none."""
    kind: Any = source_kind(data) or folder
    return kind(data)


class TrainingCrops(Dataset):
    """Position k of training -> uint8 (3, size, size): image `permutation(epoch)[k % n]` with a crop drawn from
    (seed, k). So position k fixes image and crop, whatever the rank or restart. indices: the images to train on."""

    def __init__(self, source: Source, indices: np.ndarray, size: int, seed: int, min_scale: float):
        self.source, self.indices, self.size, self.seed, self.min_scale = source, indices, size, seed, min_scale
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, k: int) -> Tensor:
        epoch, place = divmod(k, len(self.indices))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, "order", epoch, len(self.indices))
        image = self.source.open(int(self.indices[self._order[place]]))
        if self.min_scale == 1:
            return to_tensor(center_crop(image, self.size))
        draws = uniforms(self.seed, "crop", np.array([k]), 4)[0]
        return to_tensor(random_crop(image, self.size, draws, self.min_scale))


class Views(Dataset):
    """Image number i of a source -> uint8 (views, 3, size, size), cut by `crops`: (image, size) -> list of images."""

    def __init__(self, source: Source, size: int, crops: Callable[[Image.Image, int], list[Image.Image]]):
        self.source, self.size, self.crops = source, size, crops

    def __getitem__(self, i: int) -> Tensor:
        image = self.source.open(int(i))
        return torch.stack([to_tensor(view) for view in self.crops(image, self.size)])


def read_batches(dataset: Dataset, batches: Iterable[Iterable[int]], workers: int) -> Iterator[Tensor]:
    """The items of `dataset` at each batch's indices, stacked, in order, read ahead by `workers` processes (0 = in this
    process). An unreadable image raises its DataError in this process, as one line and not as a worker's traceback.
    Raises UserError when the workers cannot be started, one dies, or none delivers for PATIENCE seconds."""
    if workers < 0:
        raise UserError(f"workers is {workers}, expected 0 or more")
    loader = DataLoader(
        _ErrorsAsItems(dataset), batch_sampler=cast(Any, batches), num_workers=workers, collate_fn=_stack,
        pin_memory=torch.cuda.is_available(), timeout=PATIENCE if workers else 0, worker_init_fn=_begin,
        # The default until Python 3.13. Its successor, forkserver, takes seconds to start and pickles the dataset.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )  # fmt: skip
    try:
        if workers:
            torch.multiprocessing.Queue().close()  # fails here first: a half-built loader prints errors when deleted
        stream = iter(loader)
    except OSError as error:
        raise UserError(f"{workers} reading processes cannot be started ({error}); {_CURE}") from None
    with _deaths() as heard_here:
        while True:
            failure = None
            try:
                with heard_here:
                    batch = next(stream, None)
            except (RuntimeError, OSError, EOFError) as error:  # the last two: a worker died while it sent a batch
                failure = _worker_failure(error) if workers else error
            if failure is not None:
                raise failure
            if batch is None:
                return
            if isinstance(batch, UserError):
                raise batch
            yield torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch


def _begin(_: int) -> None:
    """Of a reading process."""
    lock.leave_to_parent()
    # A signal to stop reaches all processes of a job; the trainer, which saves first, still needs its readers.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _worker_failure(error: Exception) -> Exception:
    """An error of the loader -> a one-line UserError when a worker died or delivers nothing, else the error itself."""
    text = " ".join(f"{error}".split()) or type(error).__name__
    if isinstance(error, RuntimeError) and not text.startswith(("DataLoader worker", "DataLoader timed out")):
        return error
    return UserError(
        f"the processes that read images failed: {text} A killed one was often short of memory, and one that delivers "
        f"nothing waits for its disk; {_CURE}"
    )


class _Deaths:
    """Where the death of a worker is raised. torch's handler of SIGCHLD raises wherever the main thread happens to be;
    this one raises only inside its context, and keeps a death that it hears of outside until the context is entered.
    torch's handler is still called at once, because it recognises a dead worker only until the process is reaped, and
    starting another process reaps it."""

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
    """While batches are read: gives the context in which to wait for the next one."""
    handler = signal.getsignal(signal.SIGCHLD)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield nullcontext()
        return
    if not isinstance(handler, _Deaths):
        signal.signal(signal.SIGCHLD, handler := _Deaths(handler))
    if handler.readers == 0:
        handler.told = None  # it concerns a reader that has ended
    handler.readers += 1
    try:
        yield handler
    finally:
        handler.readers -= 1


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
    batch = torch.stack(cast(list[Tensor], items))
    if get_worker_info() is None:
        return batch
    try:
        return batch.share_memory_()
    except (RuntimeError, OSError):  # /dev/shm is full (64 MB in a container): send an array through the pipe instead
        return batch.numpy()
