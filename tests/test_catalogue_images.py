"""Bad image folders and image files, as `mutor encode` meets them: the command ends with the exit code, in one line
that says what is wrong. Files that are odd and good are read, and say how many images there are."""

import errno
import io
import os
import shutil
import socket
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.rows import cut, flip, nothing, numbers, text, tried, words_of
from PIL import Image, ImageFile

from mutor_vision.data import folder as folders
from mutor_vision.data import images

ENCODE = "encode --tokenizer {tokenizer} --data {data} --out {out} --workers 0"
RANDOM = "--features timm:test_resnet@32 --weights random"
ALL, MORE = "6 images of 2 classes", "7 images of 2 classes"  # what is said of a folder whose images are all good
PNG = b"\x89PNG\r\n\x1a\n"


def noise(width=20, height=18, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def content(image, format, **settings):
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def another(name, image, format="PNG", **settings):
    """One image more."""
    return text(f"ant/{name}", content(image, format, **settings))


JPEG = content(noise(64, 64), "JPEG")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def by_hand(width, height, bits=8, colours=2, rows=b"", *further):
    """A PNG as Pillow writes none."""
    head = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    return PNG + chunk(b"IHDR", head) + b"".join(further) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def ycck():
    """A CMYK JPEG whose Adobe marker says that the colours are stored as YCCK."""
    whole = bytearray(content(noise(mode="CMYK"), "JPEG"))
    whole[whole.index(b"Adobe") + 11] = 2
    return bytes(whole)


def scans(count):
    """A progressive JPEG whose scans are repeated: little to read, much to decode."""
    whole = content(noise(64, 64), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * count + whole[-2:]


def frames(format):
    pictures = [noise(seed=seed) for seed in range(3)]
    return content(pictures[0], format, save_all=True, append_images=pictures[1:])


def archive(folder):
    with zipfile.ZipFile(folder.parent / "images.zip", "w") as file:
        file.write(folder / "ant/0.png", "ant/0.png")


def loose(folder):
    """The images without their class folders."""
    for path in list(folder.rglob("*.png")):
        path.rename(folder / path.name)
    for path in list(folder.iterdir()):
        if path.is_dir():
            path.rmdir()


def link(name, to):
    return lambda folder: (folder / name).symlink_to(to(folder) if callable(to) else to)


def outside(folder):
    (folder.parent / "elsewhere.png").write_bytes(content(noise(), "PNG"))
    return folder.parent / "elsewhere.png"


def listening(folder):
    os.chdir(folder / "ant")  # a socket's path may have 108 bytes
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("x.png")


def all_of(*makes):
    return lambda folder: [make(folder) for make in makes]


def classes(*names):
    """Class folders of one image each, in place of the folder's own."""

    def write(folder):
        shutil.rmtree(folder)
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "0.png").write_bytes(content(noise(), "PNG"))

    return write


COMPOSED, APART = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
# Row of the catalogue -> how the folder is made, exit code, what the line says.
FOLDERS = {
    "A1 no folder": (lambda f: shutil.rmtree(f), 3, "does not exist; the nearest folder that does is"),
    "A3 empty folder": (lambda f: [shutil.rmtree(f), f.mkdir()], 3, "expected one sub-folder of images for each class"),
    "A3 other files only": (lambda f: [shutil.rmtree(f), text("ant/0.txt", "x")(f)], 3, "holds no image; expected"),
    "A4 no class folders": (loose, 3, "has images directly in it and no class folders"),
    "A4 some beside the class folders": (text("x.png", JPEG), 0, "1 images outside of the class folders"),
    "A5 a class without images": (lambda f: (f / "cat").mkdir(), 3, "cat holds no image"),
    "A7 folders that systems leave": (
        all_of(text(".ipynb_checkpoints/x.png", JPEG), text("__MACOSX/x.png", JPEG)), 0, ALL),
    "A8 a name in two forms of Unicode": (classes(COMPOSED, APART), 3, "in two forms of Unicode"),
    "A8 a name in two letter cases": (classes("Cat", "cat"), 0, "2 images of 2 classes"),
    "A10 files that systems leave": (
        all_of(text("ant/.DS_Store", "x"), text("ant/Thumbs.db", "x"), text("ant/._x.JPEG", "x")), 0,
        "ignored, as systems leave it behind: .*, Thumbs.db"),
    "A11 zero bytes": (text("ant/x.jpg", ""), 3, "ant/x.jpg: not a complete image (it is empty)"),
    "A12 a web page": (text("ant/x.jpg", "<html>404 not found</html>"), 3, "it begins with b'<html>404 not f"),
    "A13 a Git LFS pointer": (text("ant/x.jpg", "version https://git-lfs.github.com/spec/v1\n"), 3, "b'version https"),
    "A14 half of a JPEG": (text("ant/x.jpg", JPEG[: len(JPEG) // 2]), 3, "ant/x.jpg: not a complete image"),
    "A15 a JPEG without its end": (text("ant/x.jpg", JPEG[:-2]), 3, "ant/x.jpg: not a complete image"),
    "A16 a late cut is not filled with grey": (text("ant/x.jpg", JPEG[:-200]), 3, "ant/x.jpg: not a complete image"),
    "A17 a damaged PNG": (flip("ant/0.png", 300), 3, "ant/0.png: not a complete image"),
    "A17 a cut PNG": (cut("ant/0.png"), 3, "ant/0.png: not a complete image"),
    "A18 a PNG named JPEG": (another("x.JPEG", noise()), 0, MORE),
    "A19 CMYK": (another("x.jpg", noise(mode="CMYK"), "JPEG"), 0, MORE),
    "A20 YCCK": (text("ant/x.jpg", ycck()), 0, MORE),
    "A21 grey": (another("x.jpg", noise(mode="L"), "JPEG"), 0, MORE),
    "A22 transparent": (another("x.png", noise(mode="RGBA")), 0, MORE),
    "A23 grey and transparent": (another("x.png", noise(mode="LA")), 0, MORE),
    "A23 palette with transparency": (another("x.png", noise(mode="P"), transparency=bytes(range(256))), 0, MORE),
    "A24 16 bits, grey": (text("ant/x.png", by_hand(4, 4, 16, 0, b"\0\1\2\3\4\5\6\7\0" * 4)), 3, "a 16-bit PNG"),
    "A25 16 bits, colours": (text("ant/x.png", by_hand(4, 4, 16, 2, bytes(100))), 3, "a 16-bit PNG"),
    "A25 floats": (another("x.tif", noise(mode="F"), "TIFF"), 3, "a 32-bit TIFF"),
    "A26 one bit": (another("x.png", noise(mode="1")), 0, MORE),
    "A27 EXIF orientation": (another("x.jpg", noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6"
                                     b"\0\0\0\0\0\0"), 0, MORE),
    "A28 damaged EXIF": (another("x.jpg", noise(), "JPEG", exif=b"Exif\0\0MM\0*junk" * 9), 0, MORE),
    "A29 damaged colour profile": (another("x.png", noise(), icc_profile=bytes(200_000)), 0, MORE),
    "A30 an archive behind it": (text("ant/x.jpg", JPEG + b"PK\x03\x04" + bytes(500)), 0, MORE),
    "A31 animated GIF": (text("ant/x.gif", frames("GIF")), 3, "animated with 3 frames; extract one"),
    "A32 animated WEBP": (text("ant/x.webp", frames("WEBP")), 3, "animated with 3 frames; extract one"),
    "A33 a PSD named PNG": (text("ant/x.png", b"8BPS\0\1" + bytes(500)), 3, "it begins with b'8BPS"),
    "A33 an EPS named PNG": (text("ant/x.png", "%!PS-Adobe-3.0 EPSF-3.0\n"), 3, "it begins with b'%!PS-Adobe"),
    "A33 an SVG named PNG": (text("ant/x.png", "<svg width='9' height='9'></svg>"), 3, 'it begins with b"<svg'),
    "A33 FITS named PNG": (text("ant/x.png", "SIMPLE  =                    T"), 3, "it begins with b'SIMPLE"),
    "A33 AVIF and HEIC": (all_of(text("ant/x.avif", "x"), text("ant/x.heic", "x")), 0,
                          "2 file(s) left out by their ending or place (1 .avif, 1 .heic)"),
    "A34 one pixel": (another("x.png", noise(1, 1)), 0, MORE),
    "A35 a strip": (another("x.png", noise(3000, 2)), 3, "3000x2 pixels, at most 50:1 is cropped"),
    "A36 smaller than the crop": (another("x.png", noise(9, 7)), 0, MORE),
    "A37 100 million pixels": (text("ant/x.png", by_hand(10_000, 10_000)), 3, "at most 89,000,000"),
    "A38 200 million pixels": (text("ant/x.png", by_hand(20_000, 10_000)), 3, "too many pixels, at most 89,000,000"),
    "A39 a header and nothing": (text("ant/x.png", by_hand(60_000, 60_000)), 3, "too many pixels, at most 89,000,000"),
    "A40 text of 100 MB": (text("ant/x.png", by_hand(4, 4, 8, 2, b"\0\1\2\3\4\5\6\7\x08\1\2\3\4" * 4, chunk(
        b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 1)))), 0, MORE),
    "A41 a JPEG of 400 scans": (text("ant/x.jpg", scans(400)), 0, MORE),
    "A44 a broken link": (link("ant/x.png", "nowhere"), 3, "ant/x.png is a broken link"),
    "A44 a link to itself": (link("ant/x.png", "x.png"), 3, "ant/x.png is a broken link"),
    "A44 folders in a circle": (link("ant/again", lambda f: f), 3, "is a link to a folder that contains it"),
    "A45 a link out of the folder": (link("ant/x.png", outside), 0, MORE),
    "A46 a pipe": (lambda f: os.mkfifo(f / "ant/x.png"), 3, "ant/x.png is not a regular file"),
    "A46 a socket": (listening, 3, "ant/x.png is not a regular file"),
    "A46 a device": (link("ant/x.png", "/dev/zero"), 3, "ant/x.png is not a regular file"),
    "A47 a name that is no text": (lambda f: Path(os.fsdecode(os.fsencode(f) + b"/ant/\xff.png")).write_bytes(JPEG), 0,
                                   MORE),
    "A47 an empty file of such a name": (lambda f: Path(os.fsdecode(os.fsencode(f) + b"/ant/\xff.png")).touch(), 3,
                                         "\\udcff.png: not a complete image (it is empty)"),
    "A47 a line end in a name": (text("ant/a\nb.png", ""), 3, "ant/a\\nb.png: not a complete image"),
    "A47 a terminal's orders in a name": (text("ant/\x1b[31mred.png", ""), 3, "ant/\\x1b[31mred.png: not a complete"),
    "A54 all black": (another("x.png", Image.new("RGB", (30, 30))), 0, MORE),
    "A55 half of them bad": (all_of(*(text(f"ant/{number}.png", "no image") for number in range(3))), 3,
                             "3 of 6 images cannot be used: "),
}  # fmt: skip


def gone_after_the_check(folder, patch):
    look = folders.Files.check

    def then_gone(self, numbers):
        found = look(self, numbers)
        (folder / "ant/0.png").unlink()
        return found

    patch.setattr(folders.Files, "check", then_gone)


def unreadable(number):
    def make(folder, patch):
        opened = images._file

        def refused(path, content):
            if Path(path).name == "0.png":
                raise OSError(number, os.strerror(number), str(path))
            return opened(path, content)

        patch.setattr(images, "_file", refused)

    return make


def killed_in_the_decoder(folder, patch):
    here = os.getpid()
    patch.setattr(Image.Image, "load", lambda self: os.kill(os.getpid(), 9 if os.getpid() != here else 0))


def full_shared_memory(folder, patch):
    def share_memory_(tensor):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    patch.setattr(torch.Tensor, "share_memory_", share_memory_)


# Row -> what the system does (of the folder and monkeypatch), further words, exit code, what the line says.
SYSTEM = {
    "A42 a decoder that crashes": (killed_in_the_decoder, "--workers 1", 2, "the processes that read images failed"),
    "A43 no right to read": (unreadable(errno.EACCES), "", 3, "ant/0.png: cannot be read (Permission denied)"),
    "A50 gone while it is read": (gone_after_the_check, "", 3, "ant/0.png: no such file"),
    "A51 a disk that fails": (unreadable(errno.EIO), "", 3, "ant/0.png: cannot be read (Input/output error)"),
    "A51 a server that forgot the file": (unreadable(errno.ESTALE), "", 3, "ant/0.png: cannot be read (Stale file"),
}


# Row -> how the folder is made, the command's words, exit code, what the line says.
COMMANDS = {
    "A2 an archive": (archive, ENCODE.replace("{data}", "{folder}/images.zip"), 3, "is an archive: extract it first"),
    "A2 a file": (nothing, ENCODE.replace("{data}", "{data}/ant/0.png"), 3, "is a file, expected a folder"),
    "A4 no classes, for a reference": (
        loose, "reference --data {data} --image-size 16 --out {out}.npz " + RANDOM, 0, "6 images"),
    "A6 fewer classes than the settings say": (
        nothing, "train --preset digits-mutor-2d --codes {codes} --out {out} --set model.num_classes=6 --dry-run", 5,
        "model.num_classes is 6, but the token set"),
    "A53 held-out images that are the others": (
        nothing, "train-tokenizer --preset digits --data {data} --val-data {data} --out {out}", 2, "val_data is data"),
    "A14 half of a JPEG, left out": (text("ant/x.jpg", JPEG[: len(JPEG) // 2]), ENCODE + " --skip-bad 1", 0, ALL),
    "A55 more bad ones than may be": (
        all_of(text("ant/x.jpg", ""), text("ant/y.jpg", "")), ENCODE + " --skip-bad 1", 3, "2 of 8 images"),
}  # fmt: skip

NOT_OURS = {
    "A49": "of a file that another program writes while it is encoded no one can say which content was meant; changes "
           "between two calls are found (test_tokenizer_commands.py)",
    "A52": "an image in two classes is a choice of the data set; contents are not compared for it",
}  # fmt: skip


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two classes of three images each."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        text(f"data/{'ant' if number < 3 else 'bee'}/{number}.png", content(noise(seed=number), "PNG"))(tmp_path)
    return tmp_path / "data"


@pytest.fixture
def called(command, data, tiny_tokenizer_path, token_set_path):
    def call(row, words, code, says):
        places = {"data": data, "folder": data.parent, "out": data.parent / "out", "tokenizer": tiny_tokenizer_path,
                  "codes": token_set_path}  # fmt: skip
        tried("Bad image folders are told", row, command, ["mutor", *words_of(words, **places)], code, says)
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
        if code:
            assert not (data.parent / "out" / "manifest.json").exists()

    return call


@pytest.mark.parametrize("row", FOLDERS)
def test_a_bad_folder(called, data, row):
    make, code, says = FOLDERS[row]
    make(data)
    called(row, ENCODE, code, says)


@pytest.mark.parametrize("row", COMMANDS)
def test_a_folder_for_other_commands(called, data, row):
    make, words, code, says = COMMANDS[row]
    make(data)
    called(row, words, code, says)


@pytest.mark.parametrize("row", SYSTEM)
def test_a_system_that_fails(called, data, monkeypatch, row):
    make, words, code, says = SYSTEM[row]
    make(data, monkeypatch)
    called(row, f"{ENCODE} {words}", code, says)


def test_classes_in_another_order(called, data):
    called("A9 the first encoding", ENCODE, 0, ALL)
    (data / "ant").rename(data / "cow")
    (data.parent / "out/manifest.json").unlink()
    called("A9 classes in another order", ENCODE, 5, "class_names: ['ant', 'bee'] -> ['bee', 'cow']")


def test_names_that_are_html(called, data):
    shutil.copytree(data, data.parent / "others")
    for name in ("ant", "bee"):
        (data / name).rename(data / f"<img src=x onerror=alert('{name}')>")
    words = "fid --samples {data} --reference {folder}/others --report {out}.html --groups 0 --metrics fid "
    called("A48 HTML in names", words + RANDOM, 0, "written: ")
    page = (data.parent / "out.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page


def test_every_number_is_tried_or_none_of_ours():
    assert numbers("A", [*FOLDERS, *COMMANDS, *SYSTEM, "A9 ", "A48 "], NOT_OURS) == []
