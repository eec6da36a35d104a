"""The one lister of image folders, and that every command uses it."""

import builtins
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mutor_vision.data import listing
from mutor_vision.data.folder import ImageFolder
from mutor_vision.errors import DataError, ImageError
from mutor_vision.features.sources import SourceImages


def write(path, seed=0, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(18, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **settings)
    return path


@pytest.fixture
def root(tmp_path):
    """images/{ant,bee}, of 4 images each."""
    for label, name in enumerate(("ant", "bee")):
        for i in range(4):
            write(tmp_path / "images" / name / f"{i:03d}.png", 10 * label + i)
    return tmp_path / "images"


def both(root):
    """How many images training and evaluation see, and their classes; they must agree."""
    trained, scored = ImageFolder(root), SourceImages(root, image_size=16, allow_lossy=True)
    assert sorted(trained.paths) == sorted(scored.source.paths)
    assert tuple(trained.class_names) == scored.class_names
    assert np.bincount(scored.labels.numpy()).tolist() == trained.counts()
    return trained


def test_linked_classes_and_files_count_for_all_commands(root, tmp_path):
    write(tmp_path / "elsewhere" / "cat" / "0.png", 50)
    os.symlink(Path("..") / "elsewhere" / "cat", root / "cat")
    os.symlink(tmp_path / "elsewhere" / "cat" / "0.png", root / "ant" / "link.png")
    assert both(root).counts() == [5, 4, 1]


LEFT_BEHIND = (
    "__MACOSX/ant/._000.png", "ant/._000.png", ".DS_Store", "ant/.DS_Store", "lost+found/", "$RECYCLE.BIN/S-1-5/a.png",
    "$Recycle.Bin/b.png", "System Volume Information/", "ant/Thumbs.db", "ant/thumbs.db", "bee/desktop.ini",
    "ant/@eaDir/000.png/SYNOPHOTO_THUMB_XL.jpg", "#recycle/old.png", "#snapshot/ant/000.png", "@Recycle/x.png",
    ".ipynb_checkpoints/000-checkpoint.png", ".Trash-1000/files/000.png", ".git/HEAD", "ant/Icon\r",
    "ant/000.png:Zone.Identifier", "PaxHeaders.1234/000.png", "__pycache__/x.pyc", "FOUND.000/FILE0000.png",
    "LOST.DIR/",    ".snapshot/ant/000.png", "~snapshot/hourly/000.png", ".@__thumb/default000.png", "bee/.nfs0000001",
)  # fmt: skip


def test_what_systems_leave_behind_is_ignored_and_said_once(root, capsys):
    before = both(root)
    capsys.readouterr()
    for name in LEFT_BEHIND:
        if name.endswith("/"):
            (root / name).mkdir(exist_ok=True)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"\0\5\x16\7" + bytes(100))
    after = both(root)
    assert (after.paths, after.labels, after.class_names) == (before.paths, before.labels, before.class_names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2, "a line for each of the two"
    assert "__MACOSX" in printed[0] and "lost+found" in printed[0] and "left out" not in printed[0]


def test_every_format_that_is_read_safely_is_listed_in_any_letter_case(root):
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".JPEG": "JPEG", ".bmp": "BMP", ".Tif": "TIFF", ".tiff": "TIFF",
             ".gif": "GIF", ".webp": "WEBP", ".ppm": "PPM", ".PNG": "PNG"}  # fmt: skip
    for ending, kind in kinds.items():
        write(root / "bee" / f"other{ending}", format=kind)
    folder = both(root)
    assert folder.counts() == [4, 14]
    folder.check(range(18))


def test_what_is_left_out_is_counted_by_ending(root, capsys):
    for name in ("ant/1.avif", "ant/2.AVIF", "bee/notes.txt", "bee/README", "loose.png"):
        (root / name).write_bytes(b"x")
    folder = ImageFolder(root)
    assert folder.left_out == {".avif": 2, "": 1, ".txt": 1, "images outside of the class folders": 1}
    (line,) = capsys.readouterr().out.splitlines()
    assert "5 file(s) left out by their ending or place (2 .avif, " in line and "1 without ending" in line
    (root / "loose.png").unlink()
    assert SourceImages(root, image_size=16).describe()["left_out"] == {".avif": 2, "": 1, ".txt": 1}


def test_a_folder_named_like_an_image_is_a_folder(root):
    for i in range(2):
        write(root / "bee" / "scan.png" / f"page{i}.png", 90 + i)
    assert both(root).counts() == [4, 6]


@pytest.mark.parametrize("reader", [ImageFolder, SourceImages])
@pytest.mark.bad_input("images")
def test_pipes_broken_links_and_cycles_are_refused_by_name(root, reader):
    os.mkfifo(root / "bee" / "pipe.png")
    with pytest.raises(DataError, match="pipe.png is not a regular file"):
        reader(root)
    (root / "bee" / "pipe.png").unlink()
    for name in ("bee/gone.png", "gone-class", "bee/gone-folder"):
        (root / name).symlink_to(root / "nowhere")
        with pytest.raises(DataError, match=f"{os.path.basename(name)} is a broken link"):
            reader(root)
        (root / name).unlink()
    (root / "bee" / "self").symlink_to(root / "bee" / "self")
    with pytest.raises(DataError, match="self is a broken link"):
        reader(root)
    (root / "bee" / "self").unlink()
    (root / "bee" / "up").symlink_to(root)
    with pytest.raises(DataError, match="up is a link to a folder that contains it"):
        reader(root)


@pytest.mark.parametrize("reader", [ImageFolder, SourceImages])
def test_a_folder_without_rights_is_an_error_that_names_it(root, reader, monkeypatch):
    """Root may list everything, so the refusal is made by hand."""
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", refusing)
    with pytest.raises(DataError, match="bee cannot be listed .Permission denied"):
        reader(root)


def test_a_file_without_rights_is_an_error_that_names_it(root, monkeypatch):
    opened = builtins.open

    def refusing(path, *arguments, **settings):
        if str(path).endswith("ant/002.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(builtins, "open", refusing)
    with pytest.raises(ImageError, match="ant/002.png: cannot be read .Permission denied"):
        SourceImages(root, image_size=16)


def test_all_bad_files_are_named_at_once(root):
    (root / "ant" / "001.png").write_bytes((root / "ant" / "001.png").read_bytes()[:-300])
    (root / "bee" / "002.png").write_text("<html>404</html>")
    for look in (lambda: ImageFolder(root).check(range(8)), lambda: SourceImages(root, image_size=16)):
        with pytest.raises(ImageError, match="2 of 8 images cannot be used") as raised:
            look()
        assert "ant/001.png" in str(raised.value) and "bee/002.png: not a complete image (it begins with" in str(
            raised.value
        )
        assert sorted(map(os.path.basename, raised.value.paths)) == ["001.png", "002.png"]


def test_classes_have_one_name_and_number_whichever_system_made_the_copy(root, tmp_path):
    """macOS decomposes names, and decomposed ones sort elsewhere."""
    for form in ("NFC", "NFD"):
        for name in ("\u00e9tang", "fox", "zebra"):
            write(tmp_path / form / unicodedata.normalize(form, name) / "0.png")
    composed, decomposed = both(tmp_path / "NFC"), both(tmp_path / "NFD")
    assert composed.class_names == decomposed.class_names == ["fox", "zebra", "\u00e9tang"]
    shutil.copytree(tmp_path / "NFD" / "e\u0301tang", tmp_path / "NFC" / "e\u0301tang")
    with pytest.raises(DataError, match="two class folders named"):
        ImageFolder(tmp_path / "NFC")


def test_names_that_are_no_text_and_control_characters_are_listed(root, capsys):
    os.rename(write(root / "ant" / "x.png"), os.fsencode(root / "ant") + b"/\xff\x1b[31m.png")
    os.mkdir(os.fsencode(root) + b"/\xfe\ncat")
    shutil.copy(root / "ant" / "000.png", os.fsencode(root) + b"/\xfe\ncat/0.png")
    (root / "ant" / "note.\x1b[31m").write_text("x")
    folder = both(root)
    assert len(folder) == 10 and folder.fingerprint() and SourceImages(root, image_size=16).key()
    folder.check(range(10))
    assert "\x1b" not in capsys.readouterr().out


def test_numbers_in_other_scripts_do_not_stop_the_natural_order(tmp_path):
    for i, name in enumerate(("10.png", "2.png", "\u00b2.png", "\u0663.png")):
        write(tmp_path / name, i)
    assert SourceImages(tmp_path).source.paths[:2] == ["2.png", "\u0663.png"]


def test_the_order_is_torchvisions_with_folders_in_classes(tmp_path):
    from torchvision.datasets import ImageFolder as Reference

    for name in ("a/x.png", "a/b/0.png", "a/b-c/0.png", "a/b/d/1.png", "a.b/0.png", "B/9.png"):
        write(tmp_path / "set" / name)
    expected = [path for path, _ in Reference(str(tmp_path / "set")).imgs]
    assert [str(tmp_path / "set" / path) for path in ImageFolder(tmp_path / "set").paths] == expected
