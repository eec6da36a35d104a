"""Sample sets and statistics in ADM's npz format, streamed: 50,000 images are 9.8 GB and never in memory at once.

`arr_0` uint8 (N, H, W, 3) holds images; `mu`, `sigma` (pooled features) and `mu_s`, `sigma_s` (spatial features) hold
statistics. Source: guided-diffusion evaluations/evaluator.py. Files come from strangers, so nothing is unpickled or
extracted, and sizes are checked in the zip directory and the array header before an array is read. Members that are not
used here may hold anything.
"""

import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mutor_vision.errors import DataError, IntegrityError, UserError, short

MAX_MEMBERS = 1000
MAX_HEADER = 10_240  # bytes of an .npy header; numpy itself would read one of any length
MAX_RATIO = 100  # unpacked over packed size; images and statistics reach 10 at most, a zip bomb 1000
WINDOW = 256_000_000  # bytes of rows that are gathered in one pass over an array in Fortran order
READ = {"arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s", "protocol_json"}  # the members that are used here
# What zipfile and zlib raise for damaged files.
DAMAGE = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, NotImplementedError, EOFError, RuntimeError,
    ValueError, KeyError, IndexError, OverflowError, MemoryError, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class ArrayHeader:
    """The header of a member of an npz. offset: where its data begin, in bytes; fortran: the first index varies fastest
    in the file, as in arrays from MATLAB or of a transposed view."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    fortran: bool = False


class Npz:
    """A checked npz file. Raises DataError when it is missing, IntegrityError when it is damaged or an array of READ
    would need unpickling. `arrays` maps member names (without .npy) to ArrayHeader."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        _check_regular_file(self.path)
        with self._open() as archive, self._typed_errors():
            infos = archive.infolist()
            if len(infos) > MAX_MEMBERS:
                raise IntegrityError(f"{path} has {len(infos)} members, expected at most {MAX_MEMBERS}")
            if len(infos) != _told_members(self.path):  # a wrong length in the directory hides what follows it
                raise IntegrityError(f"{path}: the zip's directory is damaged; copy or download it again")
            self.members = [info.filename for info in infos]
            self.infos: dict[str, zipfile.ZipInfo] = {}
            self.arrays: dict[str, ArrayHeader] = {}
            for info in infos:
                self._take(archive, info)

    def check_crc(self) -> None:
        """Read every byte of the arrays of READ (about 1 GB/s) and raise IntegrityError when a checksum is wrong.
        Called before features are extracted, so that a damaged file does not cost an hour first."""
        with self._open() as archive, self._typed_errors():
            for name in sorted(READ.intersection(self.arrays)):
                try:
                    with archive.open(self.infos[name]) as member:
                        while member.read(1 << 20):
                            pass
                except (zipfile.BadZipFile, zlib.error):
                    raise IntegrityError(
                        f"{self.path}: member '{name}.npy' is damaged (checksum); copy the file again"
                    ) from None

    def read(self, name: str) -> np.ndarray:
        """One whole array. Check `arrays[name].shape` first if it may be large."""
        with self.rows(name) as read:
            header = self.arrays[name]
            return read(0, header.shape[0]) if header.shape else read(0, 1).reshape(())

    @contextmanager
    def rows(self, name: str) -> Iterator[Callable[[int, int], np.ndarray]]:
        """Context with a function (start, stop) -> rows of an array. Reading forward takes one pass over the file; in
        Fortran order, one pass for every WINDOW bytes of rows."""
        header = self.arrays[name]
        with self._open() as archive:
            with self._typed_errors():
                member = archive.open(self.infos[name])
                read = (_FortranRows if header.fortran else _Rows)(member, header).read

            def rows(start: int, stop: int) -> np.ndarray:
                with self._typed_errors():
                    return read(start, stop)

            with member:
                yield rows

    def _open(self) -> zipfile.ZipFile:
        with self._typed_errors():
            return zipfile.ZipFile(self.path)

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except DAMAGE as error:
            if isinstance(error, UserError):  # which is a ValueError
                raise
            hint = "is it complete, or still being written? copy or download it again"
            if "NUMPY" in (first := _first_bytes(self.path)):
                hint = "it is a bare .npy array: np.savez('FILE.npz', array) makes an npz of it"
            raise IntegrityError(
                f"{self.path} is not a complete npz ({short(error, 120)}; it begins with {first}); {hint}"
            ) from None

    def _take(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        """Add a member to `arrays`. A member that is no valid array is skipped, or refused if its name is in READ."""
        name = info.filename.removesuffix(".npy")
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise IntegrityError(f"{self.path}: member {info.filename!r} points out of the file; make it again")
        if name in self.arrays:
            raise IntegrityError(f"{self.path} has two members {info.filename!r}; make it again")
        try:
            self._check_member(info)
            header = self._header(archive, info)
        except IntegrityError:
            if name in READ:
                raise
            return
        self.infos[name], self.arrays[name] = info, header

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
        except Exception as error:  # a malicious header makes Python's parser raise many kinds
            reason = short(error, 120)
            raise IntegrityError(f"{self.path}: member {info.filename!r} has a damaged header ({reason})") from None
        if dtype.hasobject:
            raise IntegrityError(
                f"{self.path}: member {info.filename!r} holds pickled objects, which could run code and are never "
                "loaded; save plain arrays"
            )
        size = int(np.prod([max(side, 0) for side in shape], dtype=object)) * dtype.itemsize + 8 + width + length
        if size != info.file_size or any(side < 0 for side in shape):
            raise IntegrityError(
                f"{self.path}: member {info.filename!r} claims {dtype} {shape}, {size:,} bytes, but holds "
                f"{info.file_size:,}"
            )
        return ArrayHeader(tuple(shape), dtype, 8 + width + length, fortran and len(shape) > 1)


def _told_members(path: Path) -> int:
    """How many members the end of a zip file says it has, which zipfile does not compare with what it finds."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 22 - 65_535))  # its comment is the last, and has at most so many bytes
        end = file.read()
    return int.from_bytes(end[(place := end.rfind(b"PK\x05\x06")) + 10 : place + 12], "little")


class _Rows:
    """Rows of an array in C order."""

    def __init__(self, member, header: ArrayHeader):
        self.member, self.header = member, header
        self.row_bytes = int(np.prod(header.shape[1:], dtype=np.int64)) * header.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        self.member.seek(self.header.offset + start * self.row_bytes)
        data = _read_exactly(self.member, (stop - start) * self.row_bytes)
        return np.frombuffer(data, self.header.dtype).reshape(stop - start, *self.header.shape[1:])


class _FortranRows:
    """Rows of an array in Fortran order. The bytes of a row are spread over the whole file, so one pass gathers as many
    rows as WINDOW holds, from which the next reads are served."""

    def __init__(self, member, header: ArrayHeader):
        self.member, self.header = member, header
        self.columns = int(np.prod(header.shape[1:], dtype=np.int64))
        self.first, self.window = 0, np.empty((0, self.columns), header.dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        if not self.first <= start <= stop <= self.first + len(self.window):
            self._gather(start, stop)
        rows = self.window[start - self.first : stop - self.first]
        # Within a row the first index also varies fastest, so the axes are reversed to get C order.
        turned = rows.reshape(len(rows), *reversed(self.header.shape[1:]))
        return np.ascontiguousarray(turned.transpose(0, *range(turned.ndim - 1, 0, -1)))

    def _gather(self, start: int, stop: int) -> None:
        count, size = self.header.shape[0], self.header.dtype.itemsize
        stop = min(count, max(stop, start + WINDOW // max(1, self.columns * size)))
        self.first, self.window = start, np.empty((stop - start, self.columns), self.header.dtype)
        at_once = max(1, WINDOW // max(1, 8 * count * size))
        self.member.seek(self.header.offset)
        for column in range(0, self.columns, at_once):
            taken = min(at_once, self.columns - column)
            data = _read_exactly(self.member, taken * count * size)
            block = np.frombuffer(data, self.header.dtype).reshape(taken, count)
            self.window[:, column : column + taken] = block[:, start:stop].T


def is_statistics(npz: Npz) -> bool:
    """Whether a file has statistics. As in ADM's evaluator, they are then used instead of its images."""
    return "mu" in npz.arrays and "sigma" in npz.arrays


def check_image_array(npz: Npz, nchw: bool = False) -> tuple[int, int, int]:
    """(N, H, W) of `arr_0`, which must be integers (N, H, W, 3), or (N, 3, H, W) with nchw; NpzImages checks that they
    are 0 to 255. Otherwise IntegrityError."""
    if "arr_0" not in npz.arrays:
        raise IntegrityError(
            f"{npz.path} has neither images (arr_0) nor statistics (mu, sigma); it holds "
            f"{', '.join(name.removesuffix('.npy') for name in npz.members)[:200] or 'nothing'}"
        )
    header = npz.arrays["arr_0"]
    shape = header.shape
    if header.dtype.kind not in "iu":
        found = ""
        if header.dtype.kind == "f" and len(shape) == 4 and all(shape):
            with npz.rows("arr_0") as read:
                first = read(0, 1)
            found = f" from {first.min():g} to {first.max():g}"
        raise IntegrityError(
            f"{npz.path}: images are {header.dtype}{found}, expected uint8 0 to 255; write samples as uint8"
        )
    if not nchw and len(shape) == 4 and shape[1] == 3 and shape[3] != 3:
        raise IntegrityError(f"{npz.path}: axis order is (N, 3, H, W) {shape}, expected (N, H, W, 3); pass --nchw")
    if len(shape) != 4 or shape[1 if nchw else 3] != 3 or not all(shape[1:]):
        expected = "(N, 3, H, W)" if nchw else "(N, H, W, 3)"
        hint = "drop --nchw" if nchw and shape[3:] == (3,) else "convert them to RGB"
        raise IntegrityError(f"{npz.path}: images have shape {shape}, expected {expected}; {hint}")
    return (shape[0], shape[2], shape[3]) if nchw else shape[:3]


def _check_regular_file(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; expected an npz file or a folder of images") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", error)
        raise IntegrityError(f"{path} is not a regular file ({reason}); expected an npz") from None
    if not stat.S_ISREG(mode):
        raise IntegrityError(f"{path} is not a regular file; expected an npz")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected an npz") from None
    if path.stat().st_size == 0:
        raise IntegrityError(f"{path} is empty, expected an npz; copy or download it again")


def _read_exactly(member, size: int) -> bytes:
    data = member.read(size)
    if len(data) != size:
        raise EOFError("an array ends early")
    return data


def _first_bytes(path: Path) -> str:
    with open(path, "rb") as file:
        return repr(file.read(16))[1:]
