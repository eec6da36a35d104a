"""Which bytes of an image file make its pixels, by the structure of PNG (ISO 15948) and JPEG (ITU T.81).

Everything else in these files (text, colour profiles, EXIF, XMP, previews, the second pictures of phones) is taken out
before a decoder sees them: then no size, damage or meaning of metadata can refuse an image or change its pixels.
"""

import io
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_PNG = b"\x89PNG\r\n\x1a\n"
# The critical chunks, transparency, and those that tell that a PNG is animated.
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND"}
# APP1 to APP15 and comments, but for APP14, whose Adobe segment says how colours are stored, as APP0 (JFIF) does.
_JPEG_METADATA = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
_SOS, _EOI = 0xDA, b"\xff\xd9"  # start of scan, end of image


def pixel_bytes(file: BinaryIO, *, header: bool = False) -> BinaryIO:
    """An open PNG or JPEG -> the same without its metadata, in memory; any other file, and one whose structure is not
    understood -> the file itself, from its beginning. header: only as much as tells format, size and mode. Raises
    ValueError where a PNG's pixels do not have their checksum."""
    start = _start(file)
    parts = None
    if start == _PNG:
        parts = _png_parts(file, header)
    elif start[:2] == b"\xff\xd8":
        parts = _jpeg_parts(file, header)
    if not parts:
        file.seek(0)
        return file
    kept = io.BytesIO()
    for begin, size in parts:
        file.seek(begin)
        content = file.read(size)
        if start == _PNG and begin and len(content) == size > 8 and zlib.crc32(content[4:-4]) != _number(content[-4:]):
            raise ValueError(f"the checksum of its {content[4:8].decode('latin-1')} is wrong")  # Pillow compares none
        kept.write(content)
    kept.seek(0)
    return kept


def looks_complete(file: BinaryIO) -> bool:
    """Whether an open PNG, JPEG or WEBP has all bytes that it claims, found without decoding it. False also for every
    other format: there only decoding tells."""
    start, size = _start(file), os.fstat(file.fileno()).st_size
    if start == _PNG:
        return any(kind == b"IEND" and begin + length <= size for kind, begin, length in _png_chunks(file))
    if start[:4] == b"RIFF":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= size
    if start[:2] == b"\xff\xd8":
        file.seek(-2, os.SEEK_END)
        if file.read(2) == _EOI:
            return True
        # Something may follow the picture (a second one, a film, an archive): look for its end after its beginning.
        scans = [begin for marker, begin, _ in _jpeg_segments(file) if marker == _SOS]
        file.seek(scans[0] if scans else size)
        return _EOI in file.read()
    return False


def _number(content: bytes) -> int:
    return int.from_bytes(content, "big")


def _start(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(8)


def _png_parts(file: BinaryIO, header: bool) -> list[tuple[int, int]]:
    parts = [(0, len(_PNG))]
    for kind, begin, size in _png_chunks(file):
        if header and kind == b"IDAT":
            return [*parts, (begin, 8)]  # the decoder stops reading at the first chunk of pixels
        if kind in _PNG_PIXELS:
            parts.append((begin, size))
    return parts


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where it begins, its whole size) of each chunk up to IEND or the end of the file."""
    begin = len(_PNG)
    while True:
        file.seek(begin)
        head = file.read(8)
        if len(head) < 8:
            return
        kind, size = head[4:], 12 + _number(head[:4])
        yield kind, begin, size
        if kind == b"IEND":
            return
        begin += size


def _jpeg_parts(file: BinaryIO, header: bool) -> list[tuple[int, int]]:
    """[] where the structure is not understood."""
    parts = [(0, 2)]
    for marker, begin, size in _jpeg_segments(file):
        if marker == _SOS:
            return [*parts, (begin, size if header else -1)]  # the rest of the file
        if marker not in _JPEG_METADATA:
            parts.append((begin, size))
    return []


def _jpeg_segments(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """(marker, where it begins, its whole size) of each segment up to the first scan; ends early at what is none."""
    begin = 2
    while True:
        file.seek(begin)
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0x00, 0x01, *range(0xD0, 0xDA)):
            return
        if head[1] == 0xFF:  # a fill byte before the marker
            begin += 1
            continue
        size = 2 + _number(head[2:])
        yield head[1], begin, size
        if head[1] == _SOS or size < 4:
            return
        begin += size
