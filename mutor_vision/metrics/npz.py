"""Sample sets and statistics in ADM's npz format, streamed: 50,000 images are 9.8 GB and never in memory at once.

`arr_0` uint8 (N, H, W, 3) holds images; `mu`, `sigma` (pooled features) and `mu_s`, `sigma_s` (spatial features) hold
statistics. Source: guided-diffusion evaluations/evaluator.py. Files come from strangers: nothing is unpickled or
extracted, and every size is checked in the zip directory and the array header before anything is read.
"""

import io
import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mutor_vision.errors import DataError, IntegrityError

MAX_MEMBERS = 1000
MAX_HEADER = 10_240  # bytes of an .npy header; numpy would read any length before it looks
MAX_RATIO = 100  # unpacked over packed size; images and statistics reach 10 at most, a bomb 1000
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal images give equal files, whenever they were written


class NpzImageWriter:
    """Write uint8 images to `arr_0` (N, H, W, 3) of an npz, batch by batch, uncompressed.

        with NpzImageWriter("samples.npz", count=50_000, height=256, width=256) as writer:
            writer.write(images)  # uint8 (n, 3, H, W), in the order in which they are to stand

    The file appears under its name only when exactly `count` images were written; after an exception, or with fewer
    images (IntegrityError), there is nothing. np.load and OpenAI's evaluator read it.
    """

    def __init__(
        self, path: str | Path, count: int, height: int, width: int, arrays: dict[str, np.ndarray] | None = None
    ):
        """arrays: further members, such as a reference's statistics, by name."""
        self.path = Path(path)
        self.arrays = arrays or {}
        self.shape = (count, height, width, 3)
        self.written = 0
        self._partial = self.path.with_name(f".{self.path.name}.partial")

    def __enter__(self) -> "NpzImageWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._zip = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)
        for name, array in self.arrays.items():
            _write_member(self._zip, name, array)
        self._member = self._zip.open(zipfile.ZipInfo("arr_0.npy", _EPOCH), "w", force_zip64=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._member, header)
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
        self._member.close()
        self._zip.close()
        if kind is not None or self.written != self.shape[0]:
            self._partial.unlink()
            if kind is None:
                raise IntegrityError(f"{self.path}: {self.written} images written, expected {self.shape[0]}")
            return
        with open(self._partial, "rb") as file:
            os.fsync(file.fileno())
        self._partial.replace(self.path)


@dataclass(frozen=True)
class ArrayHeader:
    """What a member of an npz says of itself. `offset` is where its data begin, in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


class Npz:
    """A checked npz file. Raises DataError when it is missing, IntegrityError when it is damaged or would need
    unpickling; `arrays` maps member names (without .npy) to ArrayHeader."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        _check_regular_file(self.path)
        with self._open() as archive:
            infos = archive.infolist()
            if len(infos) > MAX_MEMBERS:
                raise IntegrityError(f"{path} has {len(infos)} members, expected at most {MAX_MEMBERS}")
            self.infos = {info.filename.removesuffix(".npy"): info for info in infos}
            for info in infos:
                self._check_member(info)
            self.arrays = {name: self._header(archive, info) for name, info in self.infos.items()}

    def check_crc(self) -> None:
        """Read every byte once (about 1 GB/s) and raise IntegrityError where a checksum disagrees: better before an
        hour of feature extraction than after it."""
        with self._open() as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise IntegrityError(f"{self.path}: member {damaged!r} is damaged (checksum); copy the file again")

    def read(self, name: str) -> np.ndarray:
        """One whole array; look at `arrays[name]` first if it may be large."""
        with self.rows(name) as read:
            header = self.arrays[name]
            return read(0, header.shape[0]) if header.shape else read(0, 1).reshape(())

    @contextmanager
    def rows(self, name: str) -> Iterator:
        """Context of a function (start, stop) -> rows of an array. Going forward is one pass over the file."""
        header = self.arrays[name]
        row = int(np.prod(header.shape[1:], dtype=np.int64)) * header.dtype.itemsize
        with self._open() as archive, archive.open(self.infos[name]) as member:

            def read(start: int, stop: int) -> np.ndarray:
                member.seek(header.offset + start * row)
                data = member.read((stop - start) * row)
                if len(data) != (stop - start) * row:
                    raise IntegrityError(f"{self.path}: '{name}' ends early; copy the file again")
                return np.frombuffer(data, header.dtype).reshape(stop - start, *header.shape[1:])

            with self._typed_errors():
                yield read

    @contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        with self._typed_errors(), zipfile.ZipFile(self.path) as archive:
            yield archive

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, RuntimeError) as error:
            raise IntegrityError(
                f"{self.path} is not a complete npz ({error}; it begins with {_first_bytes(self.path)}); "
                "is it complete, or still being written? copy or download it again"
            ) from None

    def _check_member(self, info: zipfile.ZipInfo) -> None:
        if info.flag_bits & 1:
            raise IntegrityError(f"{self.path}: member {info.filename!r} is encrypted, expected a plain npz")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise IntegrityError(
                f"{self.path}: member {info.filename!r} has zip method {info.compress_type}; use 0 or 8"
            )
        if info.file_size > MAX_RATIO * info.compress_size + MAX_HEADER:
            raise IntegrityError(
                f"{self.path}: {info.compress_size:,} bytes of member {info.filename!r} would unpack to "
                f"{info.file_size:,}; no set of images compresses so well"
            )

    def _header(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> ArrayHeader:
        with archive.open(info) as member:
            start = member.read(12)
            if start[:6] != b"\x93NUMPY":
                raise IntegrityError(f"{self.path}: member {info.filename!r} is no numpy array; expected arrays only")
            width = 2 if start[6] == 1 else 4
            length = int.from_bytes(start[8 : 8 + width], "little")
            if length > MAX_HEADER:
                raise IntegrityError(f"{self.path}: member {info.filename!r} claims a header of {length:,} bytes")
            member.seek(0)
            text = io.BytesIO(member.read(8 + width + length))
        try:
            np.lib.format.read_magic(text)
            read = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(text)
        except ValueError as error:
            raise IntegrityError(f"{self.path}: member {info.filename!r} has a damaged header ({error})") from None
        if dtype.hasobject:
            raise IntegrityError(
                f"{self.path}: member {info.filename!r} holds pickled objects, which could run code and are never "
                "loaded; save plain arrays"
            )
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize + 8 + width + length
        if size != info.file_size or fortran and len(shape) > 1:
            raise IntegrityError(
                f"{self.path}: member {info.filename!r} claims {dtype} {shape}, {size:,} bytes in C order, "
                f"but holds {info.file_size:,}"
            )
        return ArrayHeader(tuple(shape), dtype, 8 + width + length)


def is_statistics(npz: Npz) -> bool:
    """Does the file carry statistics? As in ADM's evaluator, they then go before its images."""
    return "mu" in npz.arrays and "sigma" in npz.arrays


def check_image_array(npz: Npz, nchw: bool = False) -> tuple[int, int, int]:
    """(N, H, W) of `arr_0`, which must be uint8 (N, H, W, 3), or (N, 3, H, W) with nchw. Otherwise IntegrityError."""
    if "arr_0" not in npz.arrays:
        raise IntegrityError(
            f"{npz.path} has neither images (arr_0) nor statistics (mu, sigma); it holds {', '.join(npz.arrays)[:200]}"
        )
    header = npz.arrays["arr_0"]
    shape = header.shape
    if header.dtype != np.uint8:
        found = ""
        if header.dtype.kind == "f" and len(shape) == 4 and shape[0]:
            with npz.rows("arr_0") as read:
                first = read(0, 1)
            found = f" from {first.min():g} to {first.max():g}"
        raise IntegrityError(
            f"{npz.path}: images are {header.dtype}{found}, expected uint8 0 to 255; write samples as uint8"
        )
    if not nchw and len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        raise IntegrityError(f"{npz.path}: axis order is (N, 3, H, W) {shape}, expected (N, H, W, 3); pass --nchw")
    if len(shape) != 4 or shape[1 if nchw else 3] != 3:
        expected = "(N, 3, H, W)" if nchw else "(N, H, W, 3)"
        raise IntegrityError(f"{npz.path}: images have shape {shape}, expected {expected}; convert them to RGB")
    return (shape[0], shape[2], shape[3]) if nchw else shape[:3]


def write_arrays(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """np.savez that appears under its name only when complete, with the same bytes for the same arrays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            _write_member(archive, name, array)
    partial.replace(path)


def _write_member(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _check_regular_file(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected an npz file or a folder of images") from None
    except OSError as error:
        raise IntegrityError(f"{path} is not a regular file ({error.strerror}); expected an npz") from None
    if not stat.S_ISREG(mode):
        raise IntegrityError(f"{path} is not a regular file; expected an npz")
    if path.stat().st_size == 0:
        raise IntegrityError(f"{path} is empty, expected an npz; copy or download it again")


def _first_bytes(path: Path) -> str:
    with open(path, "rb") as file:
        return repr(file.read(16))[1:]
