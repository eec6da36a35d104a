"""Sample sets and statistics written in ADM's npz format, which np.load and OpenAI's evaluator read."""

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import DataError, IntegrityError
from mutor_vision.storage.files import written

_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal images give equal files, whenever they were written


class NpzImageWriter:
    """Write uint8 images to `arr_0` (N, H, W, 3) of an npz, batch by batch, uncompressed.

        with NpzImageWriter("samples.npz", count=50_000, height=256, width=256) as writer:
            writer.write(images)  # uint8 (n, 3, H, W), in the order in which they are to stand

    Written atomically (files.written): after an exception, or when fewer than `count` images were written, which raises
    IntegrityError, there is no file. np.load and OpenAI's evaluator read it.
    """

    def __init__(
        self, path: str | Path, count: int, height: int, width: int, arrays: dict[str, np.ndarray] | None = None
    ):
        """arrays: further members, such as a reference's statistics, by name."""
        self.path = Path(path)
        self.arrays = arrays or {}
        self.shape = (count, height, width, 3)
        self.written = 0

    def __enter__(self) -> "NpzImageWriter":
        with ExitStack() as opened:
            self._zip = opened.enter_context(_archive(opened.enter_context(written(self.path))))
            for name, array in self.arrays.items():
                _write_member(self._zip, name, array)
            info = zipfile.ZipInfo("arr_0.npy", _EPOCH)
            self._member = opened.enter_context(self._zip.open(info, "w", force_zip64=True))
            header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(self._member, header)
            self._opened = opened.pop_all()
        return self

    def write(self, images: Tensor) -> None:
        """Append uint8 images (n, 3, H, W)."""
        expected = (3, *self.shape[1:3])
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected:
            raise DataError(f"images are {images.dtype} {tuple(images.shape)}, expected torch.uint8 (n, {expected})")
        if self.written + len(images) > self.shape[0]:
            raise IntegrityError(f"{self.path}: more than the {self.shape[0]} images it was opened for")
        self._member.write(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
        self.written += len(images)

    def __exit__(self, kind, error, trace) -> None:
        with self._opened:
            if error is not None:
                raise error
            if self.written != self.shape[0]:
                raise IntegrityError(f"{self.path}: {self.written} images written, expected {self.shape[0]}")


def write_arrays(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """As np.savez, but atomic, and equal arrays give equal files."""
    with written(path) as partial, _archive(partial) as archive:
        for name, array in arrays.items():
            _write_member(archive, name, array)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
    try:
        yield archive
        archive.close()
    finally:
        for _ in range(2):  # after a failed close Python closes again when it deletes the archive, and prints the error
            with suppress(OSError):
                archive.close()


def _write_member(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
