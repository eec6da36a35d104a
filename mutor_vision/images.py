"""Pixels: reading files, crops, the two ways between uint8 and [-1, 1], and grids. No other module scales a pixel.

Legend: B batch, H x W pixels. uint8 images are (B, 3, H, W) in 0..255, float images the same in [-1, 1].
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFile, ImageFont
from torch import Tensor

from mutor_vision.errors import DataError, UserError

FORMATS = ("JPEG", "PNG", "WEBP")  # an allow-list: Pillow's rarer decoders are an attack surface
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 50_000_000  # read from the header, before anything is decoded
MAX_ASPECT = 50  # long side over short side; a strip of 10000x1 would be enlarged to gigabytes before it is cropped
LOSSY_EXTENSIONS = (".jpg", ".jpeg", ".webp")


def read_image(path: str | Path) -> Image.Image:
    """A file -> an RGB Pillow image. Greyscale, CMYK and palette files are converted; transparency is composited on
    white. Raises DataError naming the file when it is truncated, no image, 16-bit, animated, a strip or over 50 Mpx."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "grey-filled images must never enter a data set"
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are read")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise DataError(f"{path}: {image.width}x{image.height} pixels, at most {MAX_ASPECT}:1 is cropped")
            if getattr(image, "n_frames", 1) > 1:
                raise DataError(f"{path}: animated with {image.n_frames} frames; extract one frame")
            if image.format == "PNG" and _png_bit_depth(path) == 16:
                raise DataError(f"{path}: a 16-bit PNG, expected 8 bits a channel; convert it")
            image.load()
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
            return image.convert("RGB")
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and its own kinds for damaged files
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path}: not a complete JPEG, PNG or WEBP image ({reason}); replace or remove it") from None


def _png_bit_depth(path: str | Path) -> int:
    # Pillow reduces 16-bit RGB to 8 bits and clips 16-bit grey, both without a word; the header tells.
    with open(path, "rb") as file:
        return file.read(25)[24]


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
    """ADM centre crop alone, for images whose mirror image is something else, such as text."""
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
    """Tokenizer training view (LlamaGen's random_crop_arr): short side to size / s with s in [min_scale, 1], a random
    square of `size`, mirrored with probability 1/2. uniforms: 4 numbers in [0, 1)."""
    image = _resize_short_side(image, int(size / (min_scale + (1 - min_scale) * uniforms[0])))
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


def grid(images: Tensor, columns: int, row_labels: list[str] | None = None, min_cell: int = 128) -> Image.Image:
    """uint8 (B, 3, H, W) -> one Pillow image, row by row with white lines between the cells and an optional name before
    each row. Images narrower than `min_cell` pixels are enlarged by a whole factor, pixel by pixel."""
    from torchvision.utils import make_grid

    factor = max(1, -(-min_cell // images.shape[-1])) if images.shape[-1] < min_cell else 1
    images = images.cpu().repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    padding = 4
    cells = to_pil(make_grid(images, nrow=columns, padding=padding, pad_value=255))
    if row_labels is None:
        return cells
    font = ImageFont.load_default(size=max(12, images.shape[-2] // 8))
    margin = max(int(font.getlength(label)) for label in row_labels) + 16
    labelled = Image.new("RGB", (cells.width + margin, cells.height), "white")
    labelled.paste(cells, (margin, 0))
    pen = ImageDraw.Draw(labelled)
    for row, label in enumerate(row_labels):
        middle = padding + row * (images.shape[-2] + padding) + images.shape[-2] // 2
        pen.text((margin - 8, middle), label, fill="black", font=font, anchor="rm")
    return labelled


def to_pil(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) -> RGB Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG that appears under its name only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format="PNG")
    partial.replace(path)
