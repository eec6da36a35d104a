"""Pixels: reading files, cropping, converting between uint8 and [-1, 1], and grids. No other module converts pixels.

Legend: B batch, H x W pixels. uint8 images are (B, 3, H, W) in 0..255, float images the same in [-1, 1].
"""

import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFile, ImageFont, UnidentifiedImageError
from torch import Tensor

from mutor_vision.data.image_bytes import looks_complete, pixel_bytes
from mutor_vision.errors import ImageError, UserError, short
from mutor_vision.names import printable
from mutor_vision.storage.files import written

# Allow-lists: Pillow's other decoders are an attack surface, or missing from some of its builds (AVIF, JPEG 2000).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".ppm",
    ".pgm", ".pbm", ".pnm",
)  # fmt: skip
MAX_PIXELS = 89_000_000  # checked in the header, before anything is decoded; Pillow itself warns from here on
# A file of more than LARGE pixels has a byte for every PIXELS_OF_A_BYTE or fewer: a photograph has one for 100, and a
# picture of one colour could take 10 KB on the disk and 1.4 GB to decode.
LARGE, PIXELS_OF_A_BYTE = 16_000_000, 200
MAX_ASPECT = 50  # long side over short side; a strip of 10000x1 would be enlarged to gigabytes before it is cropped
_LOSSY = {"JPEG", "WEBP"}
_LOSSY_TIFF = {"jpeg", "tiff_jpeg", "webp"}
_MODES_8_BIT = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LA", "PA", "La", "RGBA", "RGBa"}


@dataclass(frozen=True)
class Header:
    """What an image file says of itself."""

    format: str | None  # Pillow's name, such as 'PNG'
    mode: str  # Pillow's mode, such as 'L' or 'P'
    size: tuple[int, int]  # (width, height)
    lossy: bool  # whether its compression may have changed pixels


def read_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """A file -> an RGB Pillow image of its pixels as they are stored. content: its bytes, where it
    is no file of its own but a part of one; path then names it.

    Greyscale, bilevel, palette, CMYK (Pillow's plain formula) and YCbCr files are converted; transparency is
    composited on white. Metadata is ignored (EXIF orientation, colour profiles, gamma), as ADM, LlamaGen and
    torchvision ignore it. A phone's file with several pictures gives the first. TIFF's orientation tag is followed,
    because it says in which order the rows are stored.

    Raises ImageError naming the file when it is truncated, not an image, animated, of several pages, over
    MAX_ASPECT or MAX_PIXELS, or has more than 8 bits a channel, floats or LAB colours."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "grey-filled images must never enter a data set"
    with _opened(path, content) as image:
        image.load()
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert("RGB")


def check_image(path: str | Path, content: bytes | None = None) -> Header:
    """Raise ImageError for a file that read_image refuses, without decoding most files: of JPEG, PNG and WEBP only the
    header and the end are read. Files that look cut short, and rarer formats, are decoded. So damage in the middle of
    a file is not found here, but when training or encoding decodes it. content: as of read_image."""
    with _opened(path, content, header=True) as image:
        compression = image.info.get("compression") if image.format == "TIFF" else ""
        header = Header(image.format, image.mode, image.size, image.format in _LOSSY or compression in _LOSSY_TIFF)
    with _file(path, content) as file:
        complete = looks_complete(file)
    if not complete:
        read_image(path, content)
    return header


@contextmanager
def _opened(path: str | Path, content: bytes | None = None, header: bool = False) -> Iterator[Image.Image]:
    """The file without its metadata, opened by Pillow. Each of Pillow's many exceptions becomes an ImageError."""
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise _refused(path, "not a regular file; remove it")
        with (
            _file(path, content) as file,
            Image.open(pixel_bytes(file, header=header), formats=FORMATS) as image,
        ):
            _check_kind(path, image)
            _check_weight(path, image.size, os.path.getsize(path) if content is None else len(content))
            yield image
    except ImageError:
        raise
    except FileNotFoundError:
        raise _refused(path, "no such file") from None
    except Image.DecompressionBombError:
        raise _refused(path, f"too many pixels, at most {MAX_PIXELS:,} are read; make it smaller") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and its own kinds for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise _refused(path, f"cannot be read ({error.strerror}); mend its rights or its disk") from None
        reason = short(error)
        if isinstance(error, UnidentifiedImageError):
            with _file(path, content) as file:
                start = file.read(16)
            reason = f"it begins with {start!r}" if start else "it is empty"
        raise _refused(path, f"not a complete image ({reason}); replace or remove it") from None


def _file(path: str | Path, content: bytes | None) -> BinaryIO:
    return open(path, "rb") if content is None else io.BytesIO(content)


def _check_kind(path: str | Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _refused(path, f"{image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are read; make it smaller")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise _refused(path, f"{image.width}x{image.height} pixels, at most {MAX_ASPECT}:1 is cropped; cut it")
    if image.format == "TIFF":
        if (pages := _full_pages(image)) > 1:
            raise _refused(path, f"a TIFF of {pages} pages; save each as an image of its own")
    elif image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        raise _refused(path, f"animated with {frames} frames; extract one frame")
    if _bits(image) > 8:
        raise _refused(path, f"a {_bits(image)}-bit {image.format}, expected 8 bits a channel; convert it")
    if image.mode not in _MODES_8_BIT:
        raise _refused(path, f"pixels of kind {image.mode}, expected RGB, CMYK, grey or palette; convert it")


def _check_weight(path: str | Path, size: tuple[int, int], stored: int) -> None:
    pixels = size[0] * size[1]
    if pixels > max(LARGE, PIXELS_OF_A_BYTE * stored):
        raise _refused(path, f"{pixels:,} pixels in {stored:,} bytes: no photograph is so small; make it smaller")


def _refused(path: str | Path, reason: str) -> ImageError:
    return ImageError(f"{printable(str(path))}: {reason}", path)


def _full_pages(image: Any) -> int:  # of Pillow's class for TIFF
    """The number of pages of a TIFF, without those marked as previews or masks of another page (NewSubfileType)."""
    pages = 1
    for frame in range(1, image.n_frames):
        image.seek(frame)
        pages += not image.tag_v2.get(254, 0) & 0b101
    image.seek(0)
    return pages


def _bits(image: Any) -> int:  # of one of Pillow's classes for files
    """Bits a channel in the file. Pillow does not tell: it silently reduces 16-bit colour to 8 bits, and clips grey."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))
    arguments = image.tile[0].args if image.tile else ""
    if image.format == "PNG":
        return 16 if "16" in str(arguments) else 8
    if image.format == "PPM" and isinstance(arguments, tuple):
        return int(arguments[1]).bit_length() if arguments[1] > 0 else 32  # -1: floats
    return 16 if image.mode.startswith("I") else 8


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve with a box filter while the short side is at least 2 * size, bicubic to the exact
    short side, cut the centre. Source: guided-diffusion image_datasets.py, center_crop_arr."""
    image = _resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def ten_crop(image: Image.Image, size: int, ratio: float = 1.1) -> list[Image.Image]:
    """LlamaGen's ten views: ADM centre crop to int(size * ratio), then top-left, top-right, bottom-left,
    bottom-right and centre crops of `size`, then the same five of the mirror image, so that the sixth is the mirrored
    top right. Source: torchvision's ten_crop."""
    outer = int(size * ratio)
    image = center_crop(image, outer)
    far, mid = outer - size, round((outer - size) / 2)
    corners = [(0, 0), (far, 0), (0, far), (far, far), (mid, mid)]
    return [whole.crop((x, y, x + size, y + size)) for whole in (image, mirror(image)) for x, y in corners]


def center_flip(image: Image.Image, size: int) -> list[Image.Image]:
    """ADM centre crop and its mirror image: the paper's two views."""
    crop = center_crop(image, size)
    return [crop, mirror(crop)]


def center(image: Image.Image, size: int) -> list[Image.Image]:
    """ADM centre crop alone, for images whose mirror image would mean something else, such as text."""
    return [center_crop(image, size)]


VIEWS = {"center-flip": center_flip, "ten-crop": ten_crop, "center": center}


def views_named(name: str):
    """'center', 'center-flip' or 'ten-crop' -> function (image, size) -> list of views."""
    if name not in VIEWS:
        raise UserError(f"views is '{name}', expected one of {', '.join(VIEWS)}")
    return VIEWS[name]


def mirror(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def random_crop(image: Image.Image, size: int, uniforms: np.ndarray, min_scale: float = 0.8) -> Image.Image:
    """Tokenizer training view: ADM's random_crop_arr, which LlamaGen trains with, and a mirror image with probability
    1/2. The short side becomes a whole number drawn uniformly from ceil(size) to ceil(size / min_scale), and a random
    square of `size` is cut. uniforms: 4 numbers in [0, 1). Source: guided-diffusion image_datasets.py."""
    largest = math.ceil(size / min_scale)
    image = _resize_short_side(image, size + int(uniforms[0] * (largest - size + 1)))
    left = int(uniforms[1] * (image.width - size + 1))
    top = int(uniforms[2] * (image.height - size + 1))
    crop = image.crop((left, top, left + size, top + size))
    return mirror(crop) if uniforms[3] < 0.5 else crop


def _resize_short_side(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB Pillow image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 (..., H, W) in 0..255 -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """float (..., H, W) in [-1, 1] -> uint8 by clamp(127.5 x + 128) and truncation, the rule of ADM and LlamaGen."""
    return images.float().mul(127.5).add_(128).clamp_(0, 255).to(torch.uint8)


def grid(
    images: Tensor, columns: int, row_labels: list[str] | None = None, min_cell: int = 128,
    captions: list[str] | None = None,
) -> Image.Image:  # fmt: skip
    """uint8 (B, 3, H, W) -> one Pillow image, row by row with white lines between the cells, an optional name before
    each row, and B optional captions, cut to the width of the cell that they stand under. Images narrower than
    `min_cell` pixels are enlarged by a whole factor, pixel by pixel."""
    from torchvision.utils import make_grid

    factor = max(1, -(-min_cell // images.shape[-1])) if images.shape[-1] < min_cell else 1
    images = images.cpu().repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    padding = 4
    size = max(12, images.shape[-2] // 8)
    font, strip = ImageFont.load_default(size=size), int(1.4 * size) if captions else 0
    images = torch.nn.functional.pad(images, (0, 0, 0, strip), value=255)
    height, width = (side + padding for side in images.shape[-2:])
    cells = to_pil(make_grid(images, nrow=columns, padding=padding, pad_value=255))
    pen = ImageDraw.Draw(cells)
    for cell, caption in enumerate(captions or []):
        row, column = divmod(cell, columns)
        place = (padding // 2 + column * width + width // 2, (row + 1) * height - strip // 2)
        pen.text(place, _fitting(printable(caption), font, width - padding), fill="black", font=font, anchor="mm")
    if row_labels is None:
        return cells
    row_labels = [printable(label, limit=40) for label in row_labels]
    margin = max(int(font.getlength(label)) for label in row_labels) + 16
    labelled = Image.new("RGB", (cells.width + margin, cells.height), "white")
    labelled.paste(cells, (margin, 0))
    pen = ImageDraw.Draw(labelled)
    for row, label in enumerate(row_labels):
        middle = padding + row * height + (images.shape[-2] - strip) // 2
        pen.text((margin - 8, middle), label, fill="black", font=font, anchor="rm")
    return labelled


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, or as much of its beginning as `width` pixels hold with three dots behind it."""
    if font.getlength(text) <= width:
        return text
    shorter = (f"{text[:end].rstrip()}..." for end in range(len(text), 0, -1))
    return next((cut for cut in shorter if font.getlength(cut) <= width), "")


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> RGB Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG that appears under its name only when it is complete."""
    with written(path) as partial:
        image.save(partial, format="PNG")
