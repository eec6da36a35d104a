import math
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mutor_vision.data import images
from mutor_vision.errors import DataError, ImageError, UserError

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
@pytest.mark.bad_input("images")
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


def test_every_changed_byte_of_a_pngs_pixels_is_noticed(tmp_path):
    whole = save(gradient(24, 20), tmp_path / "x.png").read_bytes()
    for place in range(whole.index(b"IDAT") + 4, whole.index(b"IEND") - 8):
        (tmp_path / "x.png").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DataError, match="the checksum of its IDAT is wrong"):
            images.read_image(tmp_path / "x.png")


@pytest.mark.bad_input("images")
def test_strips_are_refused(tmp_path):
    with pytest.raises(DataError, match="strip.png: 600x3 pixels, at most 50:1"):
        images.read_image(save(Image.new("RGB", (600, 3)), tmp_path / "strip.png"))


# Metadata never decides about pixels.


def noise(size=(40, 36), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(*size[::-1], 3), dtype=np.uint8))


def with_chunk(path, kind, data, *, crc=None, before=b"IDAT"):
    """A PNG with one more chunk before the first of another kind."""
    content = path.read_bytes()
    place = content.index(before) - 4
    crc = zlib.crc32(kind + data) if crc is None else crc
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)
    path.write_bytes(content[:place] + chunk + content[place:])


def with_segment(path, marker, data):
    """A JPEG with one more segment at its beginning."""
    content = path.read_bytes()
    path.write_bytes(content[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + content[2:])


def large_text(path):
    with_chunk(path, b"zTXt", b"prompt\0\0" + zlib.compress(b"a" * 2_000_000))


def large_text_after_the_pixels(path):
    with_chunk(path, b"iTXt", b"w\0\1\0\0\0" + zlib.compress(b"a" * 2_000_000), before=b"IEND")


def many_texts(path):
    for number in range(70):
        with_chunk(path, b"zTXt", b"%d\0\0" % number + zlib.compress(b"a" * 1_000_000))


def large_profile(path):
    with_chunk(path, b"iCCP", b"p\0\0" + zlib.compress(bytes(3_000_000)))


def broken_profile(path):
    with_chunk(path, b"iCCP", b"p\0\7nonsense")


def damaged_text(path):
    with_chunk(path, b"tEXt", b"a\0b", crc=7)


def gamma(path):
    with_chunk(path, b"gAMA", struct.pack(">I", 9))


def orientation(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes()
    if path.suffix == ".png":
        with_chunk(path, b"eXIf", data.removeprefix(b"Exif\0\0"))
    else:
        with_segment(path, 0xE1, data)


def broken_exif(path):
    with_segment(path, 0xE1, b"Exif\0\0MM\0*" + b"\xff" * 60)


def broken_list_of_pictures(path):
    with_segment(path, 0xE2, b"MPF\0MM\0*\0\0\0\x08" + b"\xff" * 60)


def archive_behind(path):
    path.write_bytes(path.read_bytes() + b"PK\3\4" + bytes(5000))


@pytest.mark.parametrize("ending, change", [
    *[(".png", change) for change in (large_text, large_text_after_the_pixels, many_texts, large_profile,
                                      broken_profile, damaged_text, gamma, orientation, archive_behind)],
    *[(".jpg", change) for change in (orientation, broken_exif, broken_list_of_pictures, archive_behind)],
])  # fmt: skip
def test_metadata_neither_refuses_an_image_nor_changes_it(tmp_path, ending, change):
    path = save(noise(), tmp_path / f"image{ending}")
    expected = np.asarray(images.read_image(path))
    change(path)
    assert np.array_equal(images.read_image(path), expected)
    assert images.check_image(path).size == (40, 36)


def test_of_a_phones_pictures_the_first_is_the_photograph(tmp_path):
    photograph = save(noise((120, 90)), tmp_path / "plain.jpg")
    path = tmp_path / "phone.jpg"
    noise((120, 90)).save(path, format="MPO", save_all=True, append_images=[noise((60, 45), 1)])
    assert np.array_equal(images.read_image(path), images.read_image(photograph))
    header = images.check_image(path)
    assert header.size == (120, 90) and header.lossy


def test_pixels_are_pillows(tmp_path):
    """Whatever is taken out of a file before it is decoded."""
    for mode in ("L", "RGB", "CMYK"):
        for settings in ({}, {"progressive": True}, {"icc_profile": bytes(70_000), "comment": b"hm"}):
            path = save(noise().convert(mode), tmp_path / "x.jpg", quality=90, **settings)
            with Image.open(path) as plain:
                assert np.array_equal(images.read_image(path), plain.convert("RGB"))
    for mode in ("1", "L", "P", "RGB"):
        path = save(noise().convert(mode), tmp_path / "x.png")
        with Image.open(path) as plain:
            assert np.array_equal(images.read_image(path), plain.convert("RGB"))


# Formats beside JPEG, PNG and WEBP.


@pytest.mark.parametrize("ending", [".bmp", ".tif", ".ppm", ".png"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_lossless_formats_give_the_same_pixels(tmp_path, ending, mode):
    image = noise().convert(mode)
    path = save(image, tmp_path / f"x{ending}")
    assert np.array_equal(images.read_image(path), image.convert("RGB"))
    assert not images.check_image(path).lossy


def test_a_gif_of_one_frame_and_a_tiff_with_a_preview_are_images(tmp_path):
    few = noise((8, 8)).quantize(16)
    gif = save(few, tmp_path / "x.gif")
    assert np.array_equal(images.read_image(gif), few.convert("RGB"))
    from PIL import TiffImagePlugin

    preview, mark = noise((10, 9), 1), TiffImagePlugin.ImageFileDirectory_v2()
    mark[254] = 1
    preview.encoderinfo = {"tiffinfo": mark}
    noise().save(tmp_path / "x.tif", save_all=True, append_images=[preview])
    with Image.open(tmp_path / "x.tif") as both:
        assert both.n_frames == 2
    assert np.array_equal(images.read_image(tmp_path / "x.tif"), noise())


def test_lossy_compression_is_told_from_the_file(tmp_path):
    for compression, lossy in (("jpeg", True), ("tiff_lzw", False)):
        path = save(noise(), tmp_path / "x.tif", compression=compression)
        assert images.check_image(path).lossy == lossy
    assert images.check_image(save(noise(), tmp_path / "x.webp")).lossy


@pytest.mark.parametrize("build, reason", [
    (lambda path: Image.fromarray(np.zeros((9, 9), np.uint16)).save(path, "TIFF"), "a 16-bit TIFF"),
    (lambda path: Image.fromarray(np.zeros((9, 9), np.float32)).save(path, "TIFF"), "a 32-bit TIFF"),
    (lambda path: noise().convert("LAB").save(path, "TIFF"), "pixels of kind LAB"),
    (lambda path: path.write_bytes(b"P5 4 4 65535\n" + bytes(32)), "a 16-bit PPM"),
    (lambda path: path.write_bytes(b"P6 4 4 1023\n" + bytes(96)), "a 10-bit PPM"),
    (lambda path: path.write_bytes(b"Pf 4 4 1.0\n" + bytes(64)), "32-bit PPM"),
    (lambda path: noise().save(path, "AVIF"), "not a complete image"),
    (lambda path: noise().save(path, "JPEG2000"), "not a complete image"),
    (lambda path: noise().save(path, "EPS"), "not a complete image"),
    (lambda path: path.mkdir(), "not a regular file"),
    (os.mkfifo, "not a regular file"),
])  # fmt: skip
@pytest.mark.bad_input("images")
def test_what_is_not_8_bit_rgb_or_of_another_decoder_is_refused(tmp_path, build, reason):
    build(tmp_path / "x.tif")
    for read in (images.read_image, images.check_image):
        with pytest.raises(DataError, match=f"x.tif: .*{reason}"):
            read(tmp_path / "x.tif")


def test_truncation_is_found_without_decoding(tmp_path, monkeypatch):
    whole = [save(noise(), tmp_path / f"x{ending}") for ending in (".png", ".jpg", ".webp")]
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        assert [images.check_image(path).size for path in whole] == [(40, 36)] * 3
    for path in whole:
        content = path.read_bytes()
        for share in (0.2, 0.5, 0.9, 0.99):
            path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(DataError, match="not a complete image"):
                images.check_image(path)


def test_an_error_survives_the_way_from_a_worker_with_its_path(tmp_path):
    import pickle

    with pytest.raises(DataError) as raised:
        images.read_image(tmp_path / "gone.png")
    copy = pickle.loads(pickle.dumps(raised.value))
    assert copy.paths == (str(tmp_path / "gone.png"),) and str(copy) == str(raised.value)


def test_a_picture_with_any_name_before_its_rows_can_be_drawn():
    cells = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    names = ["two\nlines", "\udcff\x1b[31m", "", "\u05e9\u05dc\u05d5\u05dd", "\u732b", "long " * 80]
    assert images.grid(cells, 1, names).width < 2000
    plain, captioned = images.grid(cells, 3), images.grid(cells, 3, captions=names)
    assert captioned.width == plain.width and captioned.height > plain.height


def test_a_caption_stands_under_its_own_cell():
    """Grey cells, so that text is what is darker, and white what is lighter."""
    cells = torch.full((4, 3, 128, 128), 100, dtype=torch.uint8)
    captions = ["", "alp", "a name as long as no cell is " * 3, ""]
    picture = np.asarray(images.grid(cells, 2, captions=captions).convert("L"))
    pitch_x, pitch_y = (picture.shape[1] - 4) // 2, (picture.shape[0] - 4) // 2
    dark = {
        (row, column): int((picture[4 + row * pitch_y :, 4 + column * pitch_x :][:pitch_y, :pitch_x] < 60).sum())
        for row in range(2) for column in range(2)
    }  # fmt: skip
    assert dark[0, 0] == dark[1, 1] == 0 and 0 < dark[0, 1] < dark[1, 0]
    strip = picture[4 + 128 : pitch_y, 4:]
    assert strip.min() < 60 and (picture[4 : 4 + 128, 4 : 4 + 128] == 100).all(), "below the cell, not over it"


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


@pytest.mark.parametrize("size, min_scale", [(256, 0.8), (64, 0.8), (28, 0.7), (17, 0.33), (20, 1.0)])
def test_the_short_side_of_random_crops_is_uniform_over_whole_numbers_as_adms(size, min_scale, monkeypatch):
    """random_crop_arr: randrange(ceil(size / 1), ceil(size / min_scale) + 1); then a place uniform over all."""
    sides, resize = [], images._resize_short_side
    monkeypatch.setattr(images, "_resize_short_side", lambda image, side: sides.append(side) or resize(image, side))
    low, high = size, math.ceil(size / min_scale)
    count = 12 * (high - low + 1)
    for u in (np.arange(count) + 0.5) / count:
        images.random_crop(Image.new("L", (30, 30)), size, np.array([u, 0.5, 0.5, 0.5]), min_scale)
    assert np.bincount(sides, minlength=high + 1)[low:].tolist() == [12] * (high - low + 1)


def test_the_place_of_random_crops_is_uniform():
    """A row whose pixels are their own number, not resized: each of the 5 places equally often."""
    row = Image.fromarray(np.tile(np.arange(12, dtype=np.uint8), (8, 1)))
    lefts = [np.asarray(images.random_crop(row, 8, np.array([0, u, 0, 0.9]), 1.0))[0, 0] for u in np.arange(500) / 500]
    assert np.bincount(lefts).tolist() == [100] * 5


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


def test_a_message_shows_a_names_very_characters(tmp_path):
    path = tmp_path / "new\nline  two" / os.fsdecode(b"\xff.png")
    path.parent.mkdir()
    path.touch()
    with pytest.raises(ImageError) as caught:
        images.check_image(path)
    assert r"new\nline  two/\udcff.png: " in str(caught.value) and caught.value.paths == (str(path),)
