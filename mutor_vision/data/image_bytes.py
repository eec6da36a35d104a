"""Which bytes of an image file make its pixels, by the structure of PNG (ISO 15948) and JPEG (ITU T.81).

Everything else in these files (text, colour profiles, EXIF, XMP, previews, the second pictures of phones) is removed
before the decoder reads them, so that metadata, however large or damaged, can neither make an image unreadable nor
change its pixels.
"""

import io
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

_PNG = b"\x89PNG\r\n\x1a\n"
# The critical chunks, transparency, and the chunks of animation (by which an animated PNG is recognised and refused).
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND"}
# APP1 to APP15 and comments. APP0 (JFIF) and APP14 (Adobe) stay: they say in which colour space the pixels are stored.
_JPEG_METADATA = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
_SOS, _EOI = 0xDA, b"\xff\xd9"  # start of scan, end of image


def pixel_bytes(file: BinaryIO, *, header: bool = False) -> BinaryIO:
    """An open PNG or JPEG -> a copy without its metadata, in memory. Any other file, and a file whose structure is not
    understood, is returned itself, rewound. header: copy only what the decoder needs for format, size and mode. Raises
    ValueError when the checksum of a chunk of a PNG's pixels is wrong."""
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
            raise ValueError(f"the checksum of its {content[4:8].decode('latin-1')} is wrong")  # Pillow checks none
        kept.write(content)
    kept.seek(0)
    return kept


def looks_complete(file: BinaryIO) -> bool:
    """Whether an open PNG, JPEG or WEBP has all its bytes, found without decoding it. False for every other format,
    because there only decoding can tell."""
    start, size = _start(file), file.seek(0, os.SEEK_END)
    if start == _PNG:
        return any(kind == b"IEND" and begin + length <= size for kind, begin, length in _png_chunks(file))
    if start[:4] == b"RIFF":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= size
    if start[:2] == b"\xff\xd8":
        file.seek(-2, os.SEEK_END)
        if file.read(2) == _EOI:
            return True
        # Other data may follow the picture (a second picture, a film, an archive), so search for the end marker.
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
    """(marker, where it begins, its whole size) of each segment up to the first scan. Ends early where the bytes are no
    segment."""
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
