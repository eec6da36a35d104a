import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mutor_vision import images
from mutor_vision.errors import DataError, UserError

RED = (200, 30, 10)


def save(image, path, **settings):
    image.save(path, **settings)
    return path


def png16(path, color_type, channels):
    """A 16-bit PNG by hand: Pillow writes no 16-bit RGB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\x12\x34" * (4 * channels) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, color_type, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


# Reading.


def test_grey_cmyk_palette_and_bilevel_files_become_rgb(tmp_path):
    colour = Image.new("RGB", (8, 8), RED)
    grey = images.read_image(save(colour.convert("L"), tmp_path / "grey.png"))
    palette = images.read_image(save(colour.convert("P", palette=Image.Palette.ADAPTIVE), tmp_path / "palette.png"))
    cmyk = images.read_image(save(colour.convert("CMYK"), tmp_path / "cmyk.jpg", quality=100))
    bilevel = images.read_image(save(Image.new("1", (8, 8), 1), tmp_path / "bilevel.png"))
    assert {image.mode for image in (grey, palette, cmyk, bilevel)} == {"RGB"}
    assert len(set(grey.getpixel((3, 3)))) == 1
    assert palette.getpixel((3, 3)) == RED and bilevel.getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.subtract(cmyk.getpixel((3, 3)), RED)).max() <= 3


def test_transparency_is_laid_on_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (*RED, 0))
    clear.putpixel((1, 1), (*RED, 255))
    for image, name in ((clear, "rgba.png"), (clear.convert("LA"), "la.png"), (clear, "rgba.webp")):
        read = images.read_image(save(image, tmp_path / name, **({"lossless": True} if "webp" in name else {})))
        assert read.mode == "RGB" and read.getpixel((5, 5)) == (255, 255, 255)
    assert images.read_image(tmp_path / "rgba.png").getpixel((1, 1)) == RED
    indexed = Image.new("P", (8, 8), 0)
    indexed.putpalette([*RED, 0, 0, 0])
    assert images.read_image(save(indexed, tmp_path / "p.png", transparency=0)).getpixel((2, 2)) == (255, 255, 255)


def test_the_extension_does_not_matter_the_content_does(tmp_path):
    path = save(Image.new("RGB", (8, 8), RED), tmp_path / "png.JPEG", format="PNG")
    assert images.read_image(path).getpixel((0, 0)) == RED


@pytest.fixture
def bad(tmp_path):
    """name -> a file that must be refused."""
    noise = Image.fromarray(np.random.default_rng(0).integers(255, size=(64, 64, 3), dtype=np.uint8))
    whole = save(noise, tmp_path / "whole.jpg").read_bytes()
    content = {
        "truncated.jpg": whole[: len(whole) // 2], "without its end.jpg": whole[:-2], "empty.jpg": b"",
        "text.jpg": b"<html>404 not found</html>", "lfs.jpg": b"version https://git-lfs.github.com/spec/v1\n",
    }  # fmt: skip
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    frames = [Image.new("RGB", (8, 8), (100 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "animated.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    damaged = bytearray(save(noise, tmp_path / "x.png").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "damaged.png").write_bytes(damaged)
    png16(tmp_path / "grey16.png", 0, 1)
    png16(tmp_path / "rgb16.png", 2, 3)
    return tmp_path


@pytest.mark.parametrize(
    "name, reason",
    [
        *[(name, "not a complete image") for name in (
            "truncated.jpg", "without its end.jpg", "empty.jpg", "text.jpg", "lfs.jpg", "damaged.png")],
        *[(f"animated.{kind}", "animated with 3 frames") for kind in ("webp", "gif", "png")],
        ("pages.tif", "a TIFF of 3 pages"),
        ("grey16.png", "a 16-bit PNG"), ("rgb16.png", "a 16-bit PNG"), ("gone.png", "no such file"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_whole_8_bit_image_is_refused_by_name(bad, name, reason):
    with pytest.raises(DataError, match=reason) as raised:
        images.read_image(bad / name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_the_size_limit_is_checked_before_decoding(tmp_path, monkeypatch):
    path = save(Image.new("L", (600, 500)), tmp_path / "large.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 250_000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="600x500 pixels"):
        images.read_image(path)


def test_strips_are_refused(tmp_path):
    with pytest.raises(DataError, match="strip.png: 600x3 pixels, at most 50:1"):
        images.read_image(save(Image.new("RGB", (600, 3)), tmp_path / "strip.png"))


# Crops.


def gradient(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, x * 0], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (200, 90), (37, 500), (9, 7), (1, 1), (64, 63)])
def test_crops_are_square_whatever_comes_in(size):
    image = gradient(*size)
    assert images.center_crop(image, 32).size == (32, 32)
    assert [view.size for view in images.ten_crop(image, 32)] == [(32, 32)] * 10
    for draws in ([0, 0, 0, 0], [0.999999] * 4, [0.5, 0.2, 0.9, 0.6]):
        assert images.random_crop(image, 32, np.array(draws)).size == (32, 32)


def test_the_centre_crop_is_adms():
    """Against the recipe spelled out: box halvings while twice the size fits, bicubic, the middle."""
    image = gradient(300, 210)
    expected = image.resize((150, 105), Image.Resampling.BOX)
    scale = 64 / 105
    expected = expected.resize((round(150 * scale), round(105 * scale)), Image.Resampling.BICUBIC)
    left = (expected.width - 64) // 2
    assert np.array_equal(images.center_crop(image, 64), expected.crop((left, 0, left + 64, 64)))
    assert np.array_equal(images.center_crop(gradient(64, 64), 64), gradient(64, 64))


def test_ten_crop_is_torchvisions():
    from torchvision.transforms.functional import ten_crop

    image = gradient(80, 64)
    expected = ten_crop(images.center_crop(image, 35), 32)
    for view, reference in zip(images.ten_crop(image, 32), expected, strict=True):
        assert np.array_equal(view, reference)


def test_random_crops_cover_the_scale_asked_for_and_half_are_mirrored():
    image, draws = gradient(100, 100), np.random.default_rng(0).random((200, 4))
    crops = [np.asarray(images.random_crop(image, 20, d, min_scale=0.8)).astype(int) for d in draws]
    widths = np.array([abs(crop[10, -1, 0] - crop[10, 0, 0]) / 255 for crop in crops])
    assert 0.7 < widths.min() and widths.max() <= 1 and widths.max() - widths.min() > 0.1
    mirrored = np.mean([crop[10, -1, 0] < crop[10, 0, 0] for crop in crops])
    assert 0.35 < mirrored < 0.65


def test_an_unknown_plan_of_views_is_refused():
    with pytest.raises(UserError, match="center-flip"):
        images.views_named("centre")


# Values.


def test_pixels_survive_the_way_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    floats = images.to_float(pixels)
    assert floats.min() == -1 and floats.max() == 1
    assert torch.equal(images.to_uint8(floats), pixels)
    assert images.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_a_png_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    images.save_png(gradient(4, 4), tmp_path / "new" / "a.png")
    assert np.array_equal(images.read_image(tmp_path / "new" / "a.png"), gradient(4, 4))

    def full_disk(self, file, **settings):
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError):
        images.save_png(gradient(4, 4), tmp_path / "new" / "b.png")
    assert not (tmp_path / "new" / "b.png").exists()
