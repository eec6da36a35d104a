"""Every file that someone might hand to the evaluation: refused with one line and the right exit code, or accepted
with a warning. Numbers follow the catalogue of evaluation inputs (F1 to F52).

F6 (a bit flip in a bare .npy) does not apply: references are npz, whose checksums are read. F40 (training or
validation statistics) cannot be told from a file; its name and sha256 stand in the result, see F40 below.
"""

import contextlib
import io
import json
import os
import pickle
import runpy
import shutil
import socket
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mutor_vision.errors import IntegrityError, UserError
from mutor_vision.features.extractors import load_extractor
from mutor_vision.features.moments import Statistics
from mutor_vision.metrics import frechet
from mutor_vision.metrics.evaluate import open_set
from mutor_vision.storage import downloads as weights
from mutor_vision.storage import npz

ROOT = Path(__file__).resolve().parents[1]
DIM = 96  # features of timm's test_resnet


def command(name: str):
    """The script eval/NAME.py as a function."""
    return lambda: runpy.run_path(str(ROOT / "eval" / f"{name}.py"), run_name="__main__")


def call(monkeypatch, capsys, name: str, *arguments) -> tuple[int, str]:
    """Exit code and everything printed by eval/NAME.py, run in this process."""
    monkeypatch.setattr(sys, "argv", [f"eval/{name}.py", *map(str, arguments)])
    monkeypatch.delenv("MUTOR_DEBUG", raising=False)
    try:
        command(name)()
        code = 0
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def pictures(count: int, seed: int, size: int = 16) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def write_folder(folder: Path, images: np.ndarray, suffix: str = ".png", first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{first + index:06d}{suffix}")
    return folder


def statistics(**changes) -> dict[str, np.ndarray]:
    return {"mu": np.zeros(DIM), "sigma": np.eye(DIM)} | changes


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Samples and a reference with which everything works."""
    folder = tmp_path_factory.mktemp("good")
    write_folder(folder / "samples", pictures(24, 1))
    write_folder(folder / "reference", pictures(30, 2))
    np.savez(folder / "samples.npz", pictures(24, 1))
    return folder


# ---- damaged and hostile files, given as --reference


def html_page(path):
    path.write_text("<!DOCTYPE html><html>404 not found</html>")


def lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def truncated(path):
    np.savez(path, pictures(30, 2))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bit_flip(path):
    np.savez(path, pictures(30, 2))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Payload:
    def __reduce__(self):
        return os.system, ("touch CANARY",)


def object_array(path):
    np.savez(path, arr_0=np.array([Payload()], dtype=object))


def raw_pickle(path):
    path.write_bytes(pickle.dumps(Payload()))


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        description = {"descr": "|u1", "fortran_order": False, "shape": (64, 256, 256, 3)}
        np.lib.format.write_array_header_1_0(header, description)
        archive.writestr("arr_0.npy", header.getvalue() + bytes(64 * 256 * 256 * 3))


def member(path, data: bytes, name: str = "arr_0.npy", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, data)


def false_shape(path):
    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (50_000, 256, 256, 3)}
    np.lib.format.write_array_header_1_0(header, description)
    member(path, header.getvalue() + bytes(1000))


def huge_header(path):
    member(path, b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + bytes(100))


def encrypted(path):
    np.savez(path, pictures(30, 2))
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag in the local header, and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


def many_members(path):
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(1001):
            archive.writestr(f"{number}.npy", b"")


def symlink_loop(path):
    path.symlink_to(path)


def asymmetric(sigma=None):
    sigma = np.eye(DIM)
    sigma[0, 1] = 0.5
    return sigma


NOT_A_NUMBER = np.full((DIM, DIM), np.nan)
NEGATIVE = np.diag(np.r_[np.ones(DIM - 1), -0.1])
FLOATS = pictures(30, 2).astype(np.float32) / 255

REFERENCES = {
    "F1 missing": (lambda path: None, 3, "does not exist"),
    "F2 empty": (lambda path: path.touch(), 4, "is empty"),
    "F3 html page": (html_page, 4, "begins with '<!DOCTYPE"),
    "F3 lfs pointer": (lfs_pointer, 4, "begins with 'version"),
    "F4 truncated": (truncated, 4, "is it complete"),
    "F5 bit flip": (bit_flip, 4, "checksum"),
    "F7 object array": (object_array, 4, "pickled objects"),
    "F8 raw pickle": (raw_pickle, 4, "not a complete npz"),
    "F9 bomb": (bomb, 4, "would unpack"),
    "F10 false shape": (false_shape, 4, "but holds"),
    "F11 huge header": (huge_header, 4, "claims a header of 2,147,483,648"),
    "F12 statistics": (lambda path: np.savez(path, **statistics()), 0, "FD-timm:test_resnet@24"),
    "F13 statistics and images": (
        lambda path: np.savez(path, arr_0=pictures(30, 2), **statistics()), 0,
        "its images serve precision, recall, KID and the like",
    ),
    "F14 neither": (lambda path: np.savez(path, weights=np.ones(3), bias=np.ones(3)), 4, "it holds weights, bias"),
    "F15 shapes differ": (lambda path: np.savez(path, **statistics(sigma=np.ones((DIM, DIM - 1)))), 4, "not a mean"),
    "F16 other extractor": (lambda path: np.savez(path, mu=np.zeros(768), sigma=np.eye(768)), 5, "768 features"),
    "F17 NaN": (lambda path: np.savez(path, **statistics(sigma=NOT_A_NUMBER)), 4, "NaN or infinity"),
    "F17 not symmetric": (lambda path: np.savez(path, **statistics(sigma=asymmetric())), 4, "not symmetric"),
    "F17 negative": (lambda path: np.savez(path, **statistics(sigma=NEGATIVE)), 4, "negative eigenvalue -0.1"),
    "F18 one image": (lambda path: np.savez(path, **statistics(sigma=np.zeros((DIM, DIM)))), 4, "all zero"),
    "F19 float16": (
        lambda path: np.savez(path, **{name: value.astype(np.float16) for name, value in statistics().items()}), 0,
        "float16 statistics",
    ),
    "F20 floats 0 to 1": (lambda path: np.savez(path, FLOATS), 4, "expected uint8"),
    "F21 floats -1 to 1": (lambda path: np.savez(path, FLOATS * 2 - 1), 4, "images are float32 from -"),
    "F22 cast before scaling": (lambda path: np.savez(path, FLOATS.astype(np.uint8)), 4, "looks like 0 to 1"),
    "F23 axis order": (lambda path: np.savez(path, pictures(30, 2).transpose(0, 3, 1, 2)), 4, "pass --nchw"),
    "F25 grey": (lambda path: np.savez(path, pictures(30, 2)[..., 0]), 4, "expected (N, H, W, 3)"),
    "F25 RGBA": (lambda path: np.savez(path, np.zeros((9, 8, 8, 4), np.uint8)), 4, "expected (N, H, W, 3)"),
    "F26 no image": (lambda path: np.savez(path, pictures(30, 2)[:0]), 4, "has 0 image(s)"),
    "F26 one image": (lambda path: np.savez(path, pictures(30, 2)[:1]), 4, "has 1 image(s)"),
    "F30 other size": (lambda path: np.savez(path, pictures(30, 2, size=32)), 5, "samples are 16x16"),
    "F39 unrecorded": (lambda path: np.savez(path, **statistics()), 0, "does not say what extractor made it"),
    "F45 escaping name": (
        lambda path: np.savez(path, **statistics(), **{"../../escaped": np.ones(1)}), 4, "points out of the file",
    ),
    "F46 many members": (many_members, 4, "1001 members"),
    "F47 encrypted": (encrypted, 4, "encrypted"),
    "F47 bzip2": (lambda path: member(path, b"x" * 99, method=zipfile.ZIP_BZIP2), 4, "zip method 12"),
    "F48 symlink loop": (symlink_loop, 4, "not a regular file"),
    "F48 fifo": (os.mkfifo, 4, "not a regular file"),
    "F52 still being written": (truncated, 4, "still being written"),
}  # fmt: skip


@pytest.mark.parametrize("build, code, message", REFERENCES.values(), ids=REFERENCES.keys())
def test_reference(build, code, message, good, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "reference.npz"
    build(path)
    arguments = ("--samples", good / "samples", "--reference", path, "--features", "timm:test_resnet@32")
    got, printed = call(monkeypatch, capsys, "fid", *arguments, "--weights", "random", "--groups", 0)
    assert got == code, printed
    assert message in printed
    if code:
        assert sum("error" in line for line in printed.splitlines()) == 1, "one line, no traceback"
    assert not (tmp_path / "CANARY").exists(), "the file ran code"
    assert not list(tmp_path.parent.glob("escaped*"))


# ---- sample sets


def folder_of(count: int, **settings):
    return lambda path: write_folder(path, pictures(count, 1), **settings)


def mixed_sizes(path):
    write_folder(path, pictures(10, 1))
    write_folder(path, pictures(3, 3, size=24), first=10)


def palette(path):
    write_folder(path, pictures(10, 1))
    Image.fromarray(pictures(1, 3)[0]).quantize(16).save(path / "000010.png")


def two_runs(path):
    write_folder(path, pictures(24, 1))
    write_folder(path, pictures(3, 4), first=24)


def gap(path):
    write_folder(path, pictures(12, 1))
    (path / "000005.png").unlink()


def duplicates(path):
    write_folder(path, np.concatenate([pictures(12, 1)] * 2))


def copies_of_the_data(path):
    """A class linked under another name, and one file that was copied."""
    write_folder(path / "cat", pictures(12, 1))
    shutil.copytree(path / "cat", path.parent / "disk")
    (path / "dog").symlink_to(path.parent / "disk")
    shutil.copy(path / "cat" / "000003.png", path / "cat" / "copy.png")


def copies_in_a_class(path):
    write_folder(path / "cat", np.concatenate([pictures(6, 1)] * 2))
    write_folder(path / "dog", pictures(12, 2))


def one_colour(path):
    write_folder(path, np.concatenate([pictures(22, 1), np.full((1, 16, 16, 3), 128, np.uint8)]))


def unbalanced(path):
    write_folder(path / "cat", pictures(5, 1))
    write_folder(path / "dog", pictures(15, 3))


def truncated_png(path):
    write_folder(path, pictures(12, 1))
    file = path / "000003.png"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def reversed_channels(path):
    tinted = pictures(30, 2).astype(float) * [1.0, 0.6, 0.2]
    shutil.rmtree(path.parent / "reference")
    write_folder(path.parent / "reference", tinted.astype(np.uint8))
    write_folder(path, (pictures(24, 1) * [0.2, 0.6, 1.0]).astype(np.uint8))


def short_labels(path):
    write_folder(path, pictures(24, 1))
    np.save(path.parent / "labels.npy", np.zeros(20, np.int64))


def nothing(path):
    path.mkdir()


SAMPLES = {
    "F23 axis order, told": (lambda path: np.savez(path.with_suffix(".npz"), pictures(24, 1).transpose(0, 3, 1, 2)),
                             ["--nchw"], 0, "FD-timm"),
    "F24 red and blue exchanged": (reversed_channels, [], 0, "are they BGR?"),
    "F27 one too few": (folder_of(23), ["--num", "24"], 5, "has 23 images, expected exactly 24"),
    "F27 rounded up to a batch": (folder_of(26), ["--num", "24"], 5, "remove what is of another run"),
    "F27 called FID-50K": (folder_of(24), ["--num", "50000"], 5, "expected exactly 50,000"),
    "F28 few": (folder_of(24), [], 0, "good for a smoke test only"),
    "F29 mixed sizes": (mixed_sizes, [], 4, "(index 10) is 24x24"),
    "F31 cropped and recorded": (folder_of(24), ["--image-size", "8"], 0, "FD-timm"),
    "F32 JPEG": (folder_of(24, suffix=".jpg"), [], 4, "--allow-lossy"),
    "F32 JPEG, allowed": (folder_of(24, suffix=".jpg"), ["--allow-lossy"], 0, "are JPEG or WEBP files"),
    "F32 JPEG called PNG": (lambda path: [file.rename(file.with_suffix(".png")) for file in
                                          write_folder(path, pictures(9, 1), ".jpg").iterdir()], [], 4, "are JPEG"),
    "F33 palette": (palette, [], 4, "palette of 256 colours"),
    "F34 of two runs": (two_runs, ["--num", "24"], 5, "has 27 images"),
    "F35 gap": (gap, [], 4, "image 5 is missing between 4 and 6"),
    "F36 duplicates": (duplicates, [], 4, "12 of 24 samples are copies"),
    "F36 copies of the data": (copies_of_the_data, [], 0, "13 of 25 samples are copies"),
    "F36 duplicates in a class": (copies_in_a_class, [], 4, "6 of 24 samples are copies"),
    "F37 one colour": (one_colour, [], 4, "of one colour"),
    "F38 unbalanced": (unbalanced, [], 0, "5 to 15 samples each"),
    "F38 unbalanced, strict": (unbalanced, ["--strict"], 4, "--strict"),
    "F49 short labels": (short_labels, ["--sample-labels", "labels.npy"], 4, "20 labels for 24 images"),
    "F51 k of all": (folder_of(24), ["--neighbours", "24"], 2, "k must be less"),
    "no image": (nothing, [], 3, "holds no image"),
    "truncated image": (truncated_png, [], 3, "000003.png"),
    "unknown metric": (folder_of(24), ["--metrics", "fid,fod"], 2, "metric 'fod' does not exist"),
    "impossible metric": (folder_of(24), ["--metrics", "sfid"], 2, "needs --features inception"),
    "unknown model": (folder_of(24), ["--features", "timm:test_resnot"], 2, "did you mean 'test_resnet"),
}  # fmt: skip


@pytest.mark.parametrize("build, flags, code, message", SAMPLES.values(), ids=SAMPLES.keys())
def test_samples(build, flags, code, message, good, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good / "reference", tmp_path / "reference")
    path = tmp_path / "samples"
    build(path)
    path = path if path.exists() else path.with_suffix(".npz")
    arguments = ["--samples", path, "--reference", tmp_path / "reference", "--groups", 0]
    if "--features" not in flags:
        arguments += ["--features", "timm:test_resnet@32"]
    got, printed = call(monkeypatch, capsys, "fid", *arguments, "--weights", "random", "--json", "m.json", *flags)
    assert got == code, printed
    assert message in printed
    if code:
        assert not Path("m.json").exists(), "a refused evaluation leaves no result"
    else:
        result = json.loads(Path("m.json").read_text())
        assert result["protocol"]["samples"]["centre_crop"] == (8 if "--image-size" in flags else None)


def test_the_reference_is_named_by_its_sha256(good, tmp_path, monkeypatch, capsys):
    """F40: whether statistics are of the training or the validation set cannot be seen, so the file is stated."""
    np.savez(tmp_path / "reference.npz", **statistics())
    code, _ = call(
        monkeypatch, capsys, "fid", "--samples", good / "samples.npz", "--reference", tmp_path / "reference.npz",
        "--features", "timm:test_resnet@32", "--weights", "random", "--json", tmp_path / "m.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "m.json").read_text())
    assert code == 0 and result["protocol"]["reference"]["path"] == "reference.npz"
    assert all(len(entry["protocol"]["reference_sha256"]) == 64 for entry in result["metrics"].values())


def test_a_set_scored_against_itself_is_marked(good, tmp_path, monkeypatch, capsys):
    """F41, also when one copy is a folder and the other an npz."""
    for samples in (good / "samples", good / "samples.npz"):
        code, printed = call(
            monkeypatch, capsys, "fid", "--samples", samples, "--reference", good / "samples", "--groups", 0,
            "--features", "timm:test_resnet@32", "--weights", "random", "--json", tmp_path / "m.json",
        )  # fmt: skip
        result = json.loads((tmp_path / "m.json").read_text())
        assert code == 0 and "0 by construction" in printed and "scored-against-itself" in result["marks"]
        assert result["metrics"]["fd"]["value"] < 1e-3


def test_a_negative_distance_is_clipped_or_refused():
    """F42: by singular values nothing is complex; a matrix that is no covariance is found out."""
    identity = Statistics(torch.zeros(4).double(), torch.eye(4).double(), None)
    assert frechet.distance(identity, frechet.root(identity)) >= 0
    with pytest.raises(IntegrityError, match="samples has the negative eigenvalue -2"):
        frechet.distance(Statistics(identity.mu, -2 * identity.sigma, None), frechet.root(identity))


@pytest.mark.parametrize("build, message", [
    (lambda path: None, "do not exist"),  # F43
    (lambda path: torch.save({"weight": torch.zeros(3)}, path), "expected 6726825d"),  # F43
    (html_page, "DOCTYPE"),  # F44
])  # fmt: skip
def test_extractor_weights(build, message, good, tmp_path, monkeypatch, capsys):
    build(tmp_path / "weights.pth")
    code, printed = call(
        monkeypatch, capsys, "fid", "--samples", good / "samples", "--reference", good / "reference",
        "--weights", tmp_path / "weights.pth",
    )  # fmt: skip
    assert code == 4 and message in printed, printed


def test_inception_score_with_fewer_images_than_splits(good, monkeypatch, capsys):
    """F50, before Inception sees an image."""
    code, printed = call(
        monkeypatch, capsys, "fid", "--samples", good / "samples", "--reference", good / "reference",
        "--weights", "random", "--splits", 25,
    )  # fmt: skip
    assert code == 2 and "--splits 24 or fewer" in printed


# ---- npz files as users have them


ARGUMENTS = ("--features", "timm:test_resnet@32", "--weights", "random", "--groups", 0)


def mixed_members(path):
    """Extra arrays, a pickled one, and what re-zipping on a Mac leaves."""
    np.savez(path, arr_0=pictures(24, 1), extra=np.ones((3, 3)), settings=np.array([{"cfg": 2}], dtype=object))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._arr_0.npy", b"\0\5\x16\7")
        archive.writestr("notes.txt", "made on a Tuesday")


def zip64(path):
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, pictures(24, 1), allow_pickle=False)


SAME_IMAGES = {
    "Fortran order": lambda path: np.savez(path, np.asfortranarray(pictures(24, 1))),
    "Fortran order, compressed": lambda path: np.savez_compressed(path, np.asfortranarray(pictures(24, 1))),
    "int64": lambda path: np.savez(path, pictures(24, 1).astype(np.int64)),
    "big-endian int32": lambda path: np.savez(path, pictures(24, 1).astype(">i4")),
    "other members": mixed_members,
    "zip64": zip64,
}


@pytest.mark.parametrize("build", SAME_IMAGES.values(), ids=SAME_IMAGES.keys())
def test_an_npz_of_another_make_holds_the_same_images(build, good, tmp_path):
    build(tmp_path / "samples.npz")
    ours, plain = (open_set(path).images for path in (tmp_path / "samples.npz", good / "samples.npz"))
    for span in ((0, 24), (20, 24), (3, 7)):
        assert torch.equal(ours.read(*span), plain.read(*span))


def test_fortran_order_is_read_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "WINDOW", 5 * 16 * 16 * 3)  # five images
    np.savez(tmp_path / "f.npz", arr_0=np.asfortranarray(pictures(24, 1)), sigma=np.asfortranarray(np.eye(3)))
    file = npz.Npz(tmp_path / "f.npz")
    with file.rows("arr_0") as read:
        rows = read.__closure__[0].cell_contents.__self__
        for first in (0, 2, 4, 8, 23, 1):
            assert (read(first, first + 1) == pictures(24, 1)[first : first + 1]).all()
            assert rows.window.nbytes <= npz.WINDOW
    assert (file.read("sigma") == np.eye(3)).all()


def labels_of(values):
    return lambda path: np.savez(path, pictures(24, 1), values)


def record(text: str):
    def build(path):
        np.savez(path, pictures(24, 1))
        path.with_name(path.name + ".json").write_text(text)

    return build


def negative_shape(path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (-24, 16, 16, -3)})
    member(path, header.getvalue() + bytes(24 * 16 * 16 * 3))


def large_labels(path):
    np.savez_compressed(path, pictures(24, 1), np.zeros(90_000, np.int64) + np.arange(90_000) % 50_000)


def directory_before_the_file(path):
    np.savez(path, pictures(24, 1))
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    data[end + 16 : end + 20] = (int.from_bytes(data[end + 16 : end + 20], "little") + 5000).to_bytes(4, "little")
    path.write_bytes(data)


def torn_deflate(path):
    np.savez_compressed(path, pictures(24, 1))
    data = bytearray(path.read_bytes())
    data[200:210] = b"\xff" * 10
    path.write_bytes(data)


REFUSED = {
    "integers out of range": (lambda path: np.savez(path, 2 * pictures(24, 1).astype(int)), 4, "expected 0 to 255"),
    "negative shape": (negative_shape, 4, "claims uint8"),
    "member out of the file": (lambda path: member(path, b"", "/etc/x.npy"), 4, "points out of the file"),
    "more labels than images": (large_labels, 4, "90000 labels for 24 images"),
    "label that asks for terabytes": (labels_of(np.full(24, 10**12)), 4, "expected 0 to 99,999"),
    "negative label": (labels_of(np.full(24, -1)), 4, "class ids from -1"),
    "directory before the file": (directory_before_the_file, 4, "not a complete npz"),
    "torn compression": (torn_deflate, 4, "npz"),
    "bare npy": (lambda path: path.write_bytes(npy_bytes()), 4, "a bare .npy array"),
    "record with short labels": (record('{"num": 24, "labels_of_images": [1]}'), 4, "1 labels for 24 images"),
    "record with words for labels": (record('{"num": 24, "labels_of_images": ["a"]}'), 4, "expected class ids"),
    "record with ragged labels": (record('{"num": 24, "labels_of_images": [[1], 2]}'), 4, "are not class ids"),
    "record without a number": (record('{"labels_of_images": []}'), 4, "is not the record"),
}  # fmt: skip


def npy_bytes() -> bytes:
    file = io.BytesIO()
    np.save(file, pictures(24, 1))
    return file.getvalue()


@pytest.mark.parametrize("build, code, message", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.bad_input("evaluation")
def test_an_odd_npz_is_refused_in_one_line(build, code, message, good, tmp_path, monkeypatch, capsys):
    path = tmp_path / "samples.npz"
    build(path)
    got, printed = call(monkeypatch, capsys, "fid", "--samples", path, "--reference", good / "reference", *ARGUMENTS)
    assert got == code and message in printed, printed
    assert sum("error" in line for line in printed.splitlines()) == 1, "one line, no traceback"


def test_a_damaged_npz_is_read_whole_or_refused(tmp_path):
    """600 random damages: no other exception, whatever zipfile, zlib and numpy raise."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)
    files = []
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "whole.npz", arr_0=images, arr_1=np.arange(8), sigma=np.asfortranarray(np.eye(4)))
        files.append((tmp_path / "whole.npz").read_bytes())
    for number in range(600):
        data = bytearray(files[number % 2])
        place = int(generator.integers(len(data)))
        if number % 3:
            data[place] = int(generator.integers(256))
        else:
            del data[place : place + int(generator.integers(1, 100))]
        (tmp_path / "f.npz").write_bytes(data)
        try:
            open_set(tmp_path / "f.npz").images.read(0, 8)
        except UserError:
            pass


# ---- where results go, and where weights come from


class ClosedPipe(io.TextIOBase):
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        pass


def test_results_are_written_before_anything_is_printed(good, tmp_path, monkeypatch):
    arguments = ("--samples", good / "samples", "--reference", good / "reference", *ARGUMENTS)
    arguments += ("--json", tmp_path / "m.json", "--report", tmp_path / "new" / "page.html")
    monkeypatch.setattr(sys, "argv", ["eval/fid.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    with contextlib.suppress(SystemExit, BrokenPipeError):
        command("fid")()
    assert "metrics" in json.loads((tmp_path / "m.json").read_text()) and (tmp_path / "new" / "page.html").is_file()


@pytest.mark.parametrize("name, flags", [
    ("fid", ("--json", "/proc/nowhere/m.json")),
    ("fid", ("--report", "/proc/nowhere/page.html")),
    ("fid", ("--json", "FILE/m.json")),
    ("fid", ("--json", "FOLDER")),
    ("fid", ("--work", "/proc/nowhere")),
    ("fid", ("--work", "FILE")),
    ("fid", ("--json", "same.x", "--report", "same.x")),
    ("reference", ("--out", "/proc/nowhere/r.npz")),
    ("reference", ("--out", "r.npz", "--work", "/proc/nowhere")),
    ("cfg_sweep", ("--out", "/proc/nowhere/sweep")),
    ("cfg_sweep", ("--out", "FILE")),
    ("train_features", ("--out", "/proc/nowhere/features")),
])  # fmt: skip
def test_outputs_are_tried_before_the_work(name, flags, good, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    (tmp_path / "FOLDER").mkdir()
    before = {
        "fid": ("--samples", "/none", "--reference", "/none"), "reference": ("--data", "/none"),
        "cfg_sweep": ("--model", "/none", "--reference", "/none"), "train_features": ("--data", "/none"),
    }  # fmt: skip
    code, printed = call(monkeypatch, capsys, name, *before[name], *flags)
    assert code == 2 and ("cannot be written" in printed or "expected" in printed or "its own" in printed), printed
    assert "/none does not" not in printed and len(printed.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "FOLDER"], "nothing is left behind"


def test_a_folder_for_weights_that_cannot_be_written_is_named(good, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/proc/nowhere/torch/hub")
    code, printed = call(monkeypatch, capsys, "fid", "--samples", good / "samples", "--reference", good / "reference")
    assert code == 2 and "/proc/nowhere/torch/hub/checkpoints" in printed and "TORCH_HOME" in printed, printed
    assert "--weights FILE" in printed and len(printed.strip().splitlines()) == 1


def test_without_network_the_hint_comes_at_once(good, monkeypatch, capsys):
    """The hub's own client tries five times, with growing pauses, before it looks into its cache."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    began = time.monotonic()
    code, printed = call(monkeypatch, capsys, "fid", "--samples", good / "samples", "--reference", good / "reference",
                         "--features", "timm:test_resnet@32")  # fmt: skip
    assert code == 3 and "does not answer" in printed and "--weights FILE" in printed, printed
    assert time.monotonic() - began < 20 and not hub.HF_HUB_OFFLINE, "the client's own setting is as it was"


def test_a_host_that_only_the_proxy_can_reach_answers(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert weights.host_answers(f"http://127.0.0.1:{server.getsockname()[1]}/x")
        assert not weights.host_answers("http://127.0.0.1:9")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert weights.host_answers("https://no.such.host.invalid/x")


def test_weights_are_taken_as_users_have_them(tmp_path):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("test_vit")
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "wrapped.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": state, "ema": state}, tmp_path / "two.pth")
    torch.save(state | {"head.bias": torch.zeros(1).expand(10**10)}, tmp_path / "claims.pth")
    plain = load_extractor("timm:test_vit", str(tmp_path / "model.safetensors")).identity["state_sha256"]
    for file in (tmp_path / "wrapped.pth", tmp_path / "old.pth", tmp_path):
        assert load_extractor("timm:test_vit", str(file)).identity["state_sha256"] == plain, file
    resized = load_extractor("timm:test_vit@96", str(tmp_path / "model.safetensors"))  # positions are resized
    assert not resized.is_random
    with torch.no_grad():
        assert resized(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))["pool"].shape == (1, resized.layers["pool"])
    for file, message in (("two.pth", "save the one to use alone"), ("claims.pth", "more than are stored")):
        with pytest.raises(IntegrityError, match=message):
            load_extractor("timm:test_vit", str(tmp_path / file))
    with pytest.raises(UserError, match="of another architecture"):
        load_extractor("timm:test_resnet", str(tmp_path / "model.safetensors"))


ODD_CONFIGS = (
    "[]", "{}", '{"kind": "features", "format": 1}', "\udcff",
    '{"kind": "features", "format": 1, "architecture": 3}',
)  # fmt: skip


@pytest.mark.parametrize("text", ODD_CONFIGS, ids=range(len(ODD_CONFIGS)))
@pytest.mark.bad_input("evaluation")
def test_odd_configurations_of_features_are_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError):
        load_extractor(str(tmp_path))


MISTAKES = {
    "nothing": ("fid", (), 2),
    "no samples": ("fid", ("--reference", "R"), 2),
    "both": ("fid", ("--samples", "S", "--model", "S", "--reference", "R"), 2),
    "model without a number": ("fid", ("--model", "S", "--reference", "R"), 2),
    "model that is none": ("fid", ("--model", "S", "--num-images", 4, "--reference", "R"), 2),
    "no such samples": ("fid", ("--samples", "/none", "--reference", "R"), 3),
    "text for a number": ("fid", ("--samples", "S", "--reference", "R", "--splits", "ten"), 2),
    "batch 0": ("fid", ("--samples", "S", "--reference", "R", "--batch-size", 0), 2),
    "one group": ("fid", ("--samples", "S", "--reference", "R", "--groups", 1), 2),
    "negative number": ("fid", ("--samples", "S", "--reference", "R", "--num-images", -3), 2),
    "negative size": ("fid", ("--samples", "S", "--reference", "R", "--image-size", -3), 2),
    "seed out of range": ("fid", ("--samples", "S", "--reference", "R", "--seed", -1), 2),
    "no features": ("fid", ("--samples", "S", "--reference", "R", "--features", ""), 2),
    "features of nothing": ("fid", ("--samples", "S", "--reference", "R", "--features", "/none"), 2),
    "features without weights": ("fid", ("--samples", "S", "--reference", "R", "--features", "S"), 2),
    "a tag that timm lacks": ("fid", ("--samples", "S", "--reference", "R", "--features", "timm:test_resnet.no"), 2),
    "no name": ("fid", ("--samples", "S", "--reference", "R", "--features", "timm:"), 2),
    "size 0": ("fid", ("--samples", "S", "--reference", "R", "--features", "timm:test_resnet@0"), 2),
    "size no ASCII": ("fid", ("--samples", "S", "--reference", "R", "--features", "timm:test_resnet@\u00b2"), 2),
    "local model that is none": ("fid", ("--samples", "S", "--reference", "R", "--features", "local-dir:/none"), 2),
    "weights in a folder": ("fid", ("--samples", "S", "--reference", "R", "--features", "timm:test_resnet", "--weights",
                                    "S"), 4),
    "labels that are text": ("fid", ("--samples", "S", "--reference", "R", "--sample-labels", "TEXT"), 4),
    "labels that are none": ("fid", ("--samples", "S", "--reference", "R", "--sample-labels", "/none"), 3),
    "unknown device": ("fid", ("--samples", "S", "--reference", "R", "--device", "tpu"), 2),
    "reference of nothing": ("reference", ("--data", "/none", "--out", "r.npz"), 3),
    "reference elsewhere": ("reference", ("--data", "S", "--out", "r.json"), 2),
    "one image kept": ("reference", ("--data", "S", "--out", "r.npz", "--keep-images", 1, "--features",
                                     "timm:test_resnet", "--weights", "random"), 2),
    "scales that are words": ("cfg_sweep", ("--model", "S", "--reference", "R", "--out", "o", "--scales", "a,b"), 2),
    "no scales": ("cfg_sweep", ("--model", "S", "--reference", "R", "--out", "o", "--scales", ","), 2),
    "scales without end": ("cfg_sweep", ("--model", "S", "--reference", "R", "--out", "o", "--scales", "nan,inf"), 2),
    "sweep of no model": ("cfg_sweep", ("--model", "/none", "--reference", "R", "--out", "o"), 2),
    "sweep of one image": ("cfg_sweep", ("--model", "S", "--reference", "R", "--out", "o", "--num-images", 1), 2),
    "no classes": ("train_features", ("--data", "S", "--out", "o"), 3),
    "learning rate 0": ("train_features", ("--data", "S", "--out", "o", "--lr", 0), 2),
    "output among the images": ("train_features", ("--data", "S", "--out", "S/o"), 2),
}  # fmt: skip


@pytest.mark.parametrize("name, flags, code", MISTAKES.values(), ids=MISTAKES.keys())
@pytest.mark.bad_input("evaluation")
def test_a_mistake_is_one_line(name, flags, code, good, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink(good / "samples", tmp_path / "S")
    os.symlink(good / "reference", tmp_path / "R")
    (tmp_path / "TEXT").write_text("1\n2\n3\n")
    got, printed = call(monkeypatch, capsys, name, *flags)
    lines = [line for line in printed.splitlines() if "error" in line]
    assert got == code and len(lines) == 1 and "Traceback" not in printed, printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["R", "S", "TEXT"], "nothing is left behind"
