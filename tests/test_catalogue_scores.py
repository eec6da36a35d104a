"""Bad inputs of the evaluation, as a user may meet them: refused with the exit code in one line that says what is
wrong, or accepted with a warning. Below the rows: npz files as users have them, where results go, and where weights
come from."""

import contextlib
import io
import json
import os
import pickle
import shutil
import socket
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from faults.rows import numbers, text, tried, words_of
from PIL import Image

from mutor_vision.errors import IntegrityError, UserError
from mutor_vision.features.extractors import load_extractor
from mutor_vision.metrics.evaluate import open_set
from mutor_vision.storage import downloads as weights
from mutor_vision.storage import npz

PROMISE = "Bad inputs of the evaluation are told"
BOTH = "fid --samples {good}/samples --reference {good}/reference"
PLAIN = "--features timm:test_resnet@32 --weights random --groups 0"
DIM = 96  # features of timm's test_resnet


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
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "weights.pth")
    return folder


@pytest.fixture
def called(command, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(row, words, code, says):
        return tried(PROMISE, row, command, ["mutor", *words_of(words, good=good)], code, says)

    return call


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


def recorded(**changes):
    """Statistics with the record of what made them."""

    def build(path):
        record = {"n": 30, "image_size": [16, 16]} | changes
        record["extractor"] = load_extractor("timm:test_resnet@32", "random").identity | changes
        np.savez(path, **statistics(), protocol_json=np.frombuffer(json.dumps(record).encode(), np.uint8))

    return build


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
    "F7 pickled statistics": (lambda path: np.savez(path, mu=np.array([Payload()]), sigma=np.eye(DIM)), 4, "pickled"),
    "F10 false shape": (false_shape, 4, "but holds"),
    "F11 huge header": (huge_header, 4, "claims a header of 2,147,483,648"),
    "F12 half of the statistics": (lambda path: np.savez(path, mu=np.zeros(DIM)), 4, "it holds mu"),
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
    "F17 infinite": (lambda path: np.savez(path, **statistics(mu=np.full(DIM, np.inf))), 4, "NaN or infinity"),
    "F17 too large to be squared": (lambda path: np.savez(path, **statistics(mu=np.full(DIM, 1e200))), 4, "or 1e+100"),
    "F17 a covariance too large": (lambda path: np.savez(path, **statistics(sigma=np.eye(DIM) * 1e308)), 4, "or 1e+1"),
    "F18 one image": (lambda path: np.savez(path, **statistics(sigma=np.zeros((DIM, DIM)))), 4, "all zero"),
    "F19 float16": (
        lambda path: np.savez(path, **{name: value.astype(np.float16) for name, value in statistics().items()}), 0,
        "float16 statistics",
    ),
    "F19 whole numbers": (lambda path: np.savez(path, **statistics(mu=np.zeros(DIM, int))), 4, "expected floating"),
    "F19 complex": (lambda path: np.savez(path, **statistics(mu=np.zeros(DIM, complex))), 4, "expected floating"),
    "F20 floats 0 to 1": (lambda path: np.savez(path, FLOATS), 4, "expected uint8"),
    "F21 floats -1 to 1": (lambda path: np.savez(path, FLOATS * 2 - 1), 4, "images are float32 from -"),
    "F22 cast before scaling": (lambda path: np.savez(path, FLOATS.astype(np.uint8)), 4, "looks like 0 to 1"),
    "F23 axis order": (lambda path: np.savez(path, pictures(30, 2).transpose(0, 3, 1, 2)), 4, "pass --nchw"),
    "F25 grey": (lambda path: np.savez(path, pictures(30, 2)[..., 0]), 4, "expected (N, H, W, 3)"),
    "F25 RGBA": (lambda path: np.savez(path, np.zeros((9, 8, 8, 4), np.uint8)), 4, "expected (N, H, W, 3)"),
    "F26 no image": (lambda path: np.savez(path, pictures(30, 2)[:0]), 4, "has 0 image(s)"),
    "F26 one image": (lambda path: np.savez(path, pictures(30, 2)[:1]), 4, "has 1 image(s)"),
    "F30 other size": (lambda path: np.savez(path, pictures(30, 2, size=32)), 5, "samples are 16x16"),
    "F30 other size behind statistics": (recorded(image_size=[32, 32]), 5, "samples are 16x16"),
    "F39 another network": (recorded(name="inception"), 5, "was made with name 'inception', this run uses 'timm:test"),
    "F39 another resize": (recorded(resize="none"), 5, "was made with resize 'none', this run uses 'bicubic"),
    "F39 a damaged record": (recorded(n="many"), 4, "'protocol_json' is damaged"),
    "F39 unrecorded": (lambda path: np.savez(path, **statistics()), 0, "does not say what extractor made it"),
    "F45 escaping name": (
        lambda path: np.savez(path, **statistics(), **{"../../escaped": np.ones(1)}), 4, "points out of the file",
    ),
    "F46 many members": (many_members, 4, "1001 members"),
    "F47 encrypted": (encrypted, 4, "encrypted"),
    "F47 bzip2": (lambda path: member(path, b"x" * 99, method=zipfile.ZIP_BZIP2), 4, "zip method 12"),
    "F48 symlink loop": (symlink_loop, 4, "not a regular file"),
    "F48 a device": (lambda path: path.symlink_to("/dev/zero"), 4, "not a regular file"),
    "F48 an empty folder": (os.mkdir, 3, "holds no image"),
    "F48 fifo": (os.mkfifo, 4, "not a regular file"),
    "F52 still being written": (truncated, 4, "still being written"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFERENCES)
def test_a_bad_reference(called, tmp_path, row):
    build, code, says = REFERENCES[row]
    build(tmp_path / "reference.npz")
    called(row, f"fid --samples {{good}}/samples --reference reference.npz {PLAIN}", code, says)
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


def with_labels(labels):
    def build(path):
        write_folder(path, pictures(24, 1))
        np.save(path.parent / "labels.npy", labels)

    return build


def nothing(path):
    path.mkdir()


SAMPLES = {
    "F23 axis order, told": (lambda path: np.savez(path.with_suffix(".npz"), pictures(24, 1).transpose(0, 3, 1, 2)),
                             "--nchw", 0, "FD-timm"),
    "F23 axis order, told wrongly": (lambda path: np.savez(path.with_suffix(".npz"), pictures(24, 1)), "--nchw", 4,
                                     "(24, 16, 16, 3), expected (N, 3, H, W); drop --nchw"),
    "F24 red and blue exchanged": (reversed_channels, "", 0, "are they BGR?"),
    "F27 one too few": (folder_of(23), "--num 24", 5, "has 23 images, expected exactly 24"),
    "F27 rounded up to a batch": (folder_of(26), "--num 24", 5, "remove what is of another run"),
    "F27 called FID-50K": (folder_of(24), "--num 50000", 5, "expected exactly 50,000"),
    "F28 few": (folder_of(24), "", 0, "good for a smoke test only"),
    "F26 a folder of one image": (folder_of(1), "", 4, "has 1 image(s)"),
    "F29 mixed sizes": (mixed_sizes, "", 4, "(index 10) is 24x24"),
    "F31 cropped and recorded": (folder_of(24), "--image-size 8", 0, "FD-timm"),
    "F32 JPEG": (folder_of(24, suffix=".jpg"), "", 4, "--allow-lossy"),
    "F32 JPEG, allowed": (folder_of(24, suffix=".jpg"), "--allow-lossy", 0, "are JPEG or WEBP files"),
    "F32 JPEG called PNG": (lambda path: [file.rename(file.with_suffix(".png")) for file in
                                          write_folder(path, pictures(9, 1), ".jpg").iterdir()], "", 4, "are JPEG"),
    "F33 palette": (palette, "", 4, "palette of 256 colours"),
    "F34 of two runs": (two_runs, "--num 24", 5, "has 27 images"),
    "F35 gap": (gap, "", 4, "image 5 is missing between 4 and 6"),
    "F36 duplicates": (duplicates, "", 4, "12 of 24 samples are copies"),
    "F36 copies of the data": (copies_of_the_data, "", 0, "13 of 25 samples are copies"),
    "F36 duplicates in a class": (copies_in_a_class, "", 4, "6 of 24 samples are copies"),
    "F37 one colour": (one_colour, "", 4, "of one colour"),
    "F38 unbalanced": (unbalanced, "", 0, "5 to 15 samples each"),
    "F38 unbalanced, strict": (unbalanced, "--strict --weights {good}/weights.pth", 4, "strict: classes"),
    "F49 short labels": (with_labels(np.zeros(20, int)), "--sample-labels labels.npy", 4, "20 labels for 24 images"),
    "F49 long labels": (with_labels(np.zeros(25, int)), "--sample-labels labels.npy", 4, "25 labels for 24 images"),
    "F49 labels of fractions": (with_labels(np.zeros(24)), "--sample-labels labels.npy", 4, "is float64 (24,), expect"),
    "F49 labels in two columns": (with_labels(np.zeros((24, 2), int)), "--sample-labels labels.npy", 4, "(24, 2)"),
    "F49 labels that are a pickle": (with_labels(np.array([Payload()] * 24)), "--sample-labels labels.npy", 4, "not"),
    "F50 fewer images than splits": (folder_of(24), "--features inception --splits 25", 2, "--splits 24 or fewer"),
    "F50 no split": (folder_of(24), "--splits 0", 2, "splits is 0, expected"),
    "F51 k of 0": (folder_of(24), "--neighbours 0", 2, "k is 0, expected"),
    "F51 k of all": (folder_of(24), "--neighbours 24", 2, "k must be less"),
    "no image": (nothing, "", 3, "holds no image"),
    "truncated image": (truncated_png, "", 3, "000003.png"),
    "unknown metric": (folder_of(24), "--metrics fid,fod", 2, "metric 'fod' does not exist"),
    "impossible metric": (folder_of(24), "--metrics sfid", 2, "needs --features inception"),
    "unknown model": (folder_of(24), "--features timm:test_resnot", 2, "did you mean 'test_resnet"),
    "F4 held-out images cut": (lambda path: [folder_of(24)(path), truncated(path.with_name("cut.npz"))],
                               "--held-out cut.npz", 4, "cut.npz is not a complete npz"),
    "F41 held-out images that are the reference": (folder_of(24), "--held-out reference", 5, "100% of the held-out"),
    "F27 a number, of statistics": (lambda path: np.savez(path.with_suffix(".npz"), **statistics()), "--num 24", 2,
                                    "which have no count of images to check; drop --num"),
}  # fmt: skip


@pytest.mark.parametrize("row", SAMPLES)
def test_bad_samples(called, good, tmp_path, row):
    build, words, code, says = SAMPLES[row]
    shutil.copytree(good / "reference", tmp_path / "reference")
    build(tmp_path / "samples")
    name = "samples" if (tmp_path / "samples").exists() else "samples.npz"
    called(row, f"fid --samples {name} --reference reference {PLAIN} --json m.json {words}", code, says)
    if code:
        assert not Path("m.json").exists(), "a refused evaluation leaves no result"
    else:
        result = json.loads(Path("m.json").read_text())
        assert result["protocol"]["samples"]["centre_crop"] == (8 if "--image-size" in words else None)


def test_the_reference_is_named_by_its_sha256(called, tmp_path):
    """Whether statistics are of the training or the validation set cannot be seen, so the file is stated."""
    np.savez(tmp_path / "reference.npz", **statistics())
    words = f"fid --samples {{good}}/samples.npz --reference reference.npz {PLAIN} --json m.json"
    called("F40 the reference is stated", words, 0, "FD-timm")
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["protocol"]["reference"]["path"] == "reference.npz"
    assert all(len(entry["protocol"]["reference_sha256"]) == 64 for entry in result["metrics"].values())


@pytest.mark.parametrize("samples", ["samples", "samples.npz"])
def test_a_set_scored_against_itself_is_marked(called, tmp_path, samples):
    words = f"fid --samples {{good}}/{samples} --reference {{good}}/samples {PLAIN} --json m.json"
    called(f"F41 {samples} against itself", words, 0, "0 by construction")
    result = json.loads((tmp_path / "m.json").read_text())
    assert "scored-against-itself" in result["marks"] and result["metrics"]["fd"]["value"] < 1e-3


# Row -> covariance of the samples, whose absolute values are the reference's; exit code, what the line says.
COVARIANCES = {
    "F42 the same": (np.eye(DIM), 0, "FD-timm:test_resnet "),
    "F42 the same, of one direction": (np.ones((DIM, DIM)), 0, "FD-timm:test_resnet "),
    "F42 negative": (-2 * np.eye(DIM), 4, "samples has the negative eigenvalue -2"),
}


@pytest.mark.parametrize("row", COVARIANCES)
def test_a_negative_distance_is_clipped_or_refused(called, tmp_path, row):
    """By singular values nothing is complex; a matrix that is no covariance is found out."""
    sigma, code, says = COVARIANCES[row]
    np.savez(tmp_path / "reference.npz", **statistics(sigma=np.abs(sigma)))
    np.savez(tmp_path / "samples.npz", **statistics(sigma=sigma))
    called(row, f"fid --samples samples.npz --reference reference.npz {PLAIN} --json m.json", code, says)
    assert code or 0 <= json.loads((tmp_path / "m.json").read_text())["metrics"]["fd"]["value"] < 1e-6


def not_a_number(path):
    state = timm.create_model("test_resnet").state_dict()
    state["conv1.0.weight"][0] = float("nan")
    torch.save(state, path)


TIMM = "--features timm:test_resnet@32 --groups 0"
# Row -> how weights.pth is made, further words, exit code, what the line says.
WEIGHTS = {
    "F43 missing": (lambda path: None, "", 4, "do not exist"),
    "F43 missing, of timm": (lambda path: None, TIMM, 4, "do not exist"),
    "F43 another file": (lambda path: torch.save({"weight": torch.zeros(3)}, path), "", 4, "expected 6726825d"),
    "F43 another file, of timm": (lambda path: torch.save({"weight": torch.zeros(3)}, path), TIMM, 5, "lacks 'bn1.b"),
    "F43 a pickle": (raw_pickle, "--allow-unknown-weights", 4, "nothing in it was run"),
    "F43 a folder": (os.mkdir, "", 4, "do not exist"),
    "F43 NaN, of timm": (not_a_number, TIMM, 4, "not finite; use another file"),
    "F43 empty, of timm": (Path.touch, TIMM, 4, "is empty (0 bytes); download it again"),
    "F44 a web page": (html_page, "", 4, "DOCTYPE"),
    "F44 a web page, of timm": (html_page, TIMM, 4, "looks like a web page: the download failed"),
    "F44 a Git LFS pointer": (lfs_pointer, "--allow-unknown-weights", 4, "run git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("row", WEIGHTS)
def test_bad_weights_of_an_extractor(called, tmp_path, row):
    build, words, code, says = WEIGHTS[row]
    build(tmp_path / "weights.pth")
    called(row, f"{BOTH} --weights weights.pth {words}", code, says)
    assert not (tmp_path / "CANARY").exists(), "the file ran code"


# ---- npz files as users have them


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


def beside(text: str):
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
    "negative shape": (negative_shape, 4, "(-24, 16, 16, -3), 128 bytes, but holds 18,560"),
    "member out of the file": (lambda path: member(path, b"", "/etc/x.npy"), 4, "points out of the file"),
    "more labels than images": (large_labels, 4, "90000 labels for 24 images"),
    "label that asks for terabytes": (labels_of(np.full(24, 10**12)), 4, "expected 0 to 99,999"),
    "negative label": (labels_of(np.full(24, -1)), 4, "class ids from -1"),
    "directory before the file": (directory_before_the_file, 4, "not a complete npz"),
    "torn compression": (torn_deflate, 4, "npz"),
    "bare npy": (lambda path: path.write_bytes(npy_bytes()), 4, "makes an npz of it\n"),
    "record of another number": (beside('{"num": 20, "labels_of_images": []}'), 5, "exactly 20 (samples.npz.json)"),
    "a picture": (lambda path: Image.new("RGB", (9, 9)).save(path, "PNG"), 4, "begins with"),
    "tensors": (lambda path: torch.save(torch.zeros(3), path), 4, "neither images (arr_0)"),
    "record with short labels": (beside('{"num": 24, "labels_of_images": [1]}'), 4, "1 labels for 24 images"),
    "record with words for labels": (beside('{"num": 24, "labels_of_images": ["a"]}'), 4, "expected class ids"),
    "record with ragged labels": (beside('{"num": 24, "labels_of_images": [[1], 2]}'), 4, "are not class ids"),
    "record without a number": (beside('{"labels_of_images": []}'), 4, "is not the record"),
}  # fmt: skip


def npy_bytes() -> bytes:
    file = io.BytesIO()
    np.save(file, pictures(24, 1))
    return file.getvalue()


@pytest.mark.parametrize("row", REFUSED)
def test_an_odd_npz_is_refused(called, tmp_path, row):
    build, code, says = REFUSED[row]
    build(tmp_path / "samples.npz")
    called(row, f"fid --samples samples.npz --reference {{good}}/reference {PLAIN}", code, says)


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


def test_results_are_written_before_anything_is_printed(enter, good, tmp_path, monkeypatch):
    words = f"{BOTH} {PLAIN} --json m.json --report new/page.html"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    with contextlib.suppress(SystemExit, BrokenPipeError):
        enter("mutor", *words_of(words, good=good))
    assert "metrics" in json.loads((tmp_path / "m.json").read_text()) and (tmp_path / "new" / "page.html").is_file()


def test_a_folder_for_weights_that_cannot_be_written_is_named(called, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/proc/nowhere/torch/hub")
    said = called("a folder for weights that cannot be written", BOTH, 2, "/proc/nowhere/torch/hub/checkpoints").err
    assert "TORCH_HOME" in said and "--weights FILE" in said


def test_without_network_the_hint_comes_at_once(called, monkeypatch):
    """The hub's own client tries five times, with growing pauses, before it looks into its cache."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    began = time.monotonic()
    done = called("no network", f"{BOTH} --features timm:test_resnet@32", 3, "does not answer")
    assert "--weights FILE" in done.err
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


ODD_CONFIGS = {
    "features: a list": ("[]", "holds [], expected an object"),
    "features: nothing": ("{}", "lacks 'format'"),
    "features: no network": ('{"kind": "features", "format": 1}', "'architecture' is missing"),
    "features: no text": (b"\xff", "is not complete JSON"),
    "features: an odd network": ('{"kind": "features", "format": 1, "architecture": 3}', "'architecture' is 3"),
}


@pytest.mark.parametrize("row", ODD_CONFIGS)
def test_odd_configurations_of_features_are_refused(called, tmp_path, row):
    content, says = ODD_CONFIGS[row]
    text("own/config.json", content)(tmp_path)
    called(row, f"{BOTH} --features own", 4, says)


S_AND_R = "fid --samples S --reference R"
MISTAKES = {
    "nothing": ("fid", 2, "the following arguments are required: --reference"),
    "no samples": ("fid --reference R", 2, "give either --samples or --model"),
    "both": ("fid --samples S --model S --reference R", 2, "give either --samples or --model"),
    "model without a number": ("fid --model S --reference R", 2, "--model needs --num-images, 2 or more; got 0"),
    "model that is none": ("fid --model S --num-images 4 --reference R", 2, "S holds no checkpoint; expected a run"),
    "no such samples": ("fid --samples /none --reference R", 3, "/none does not exist; expected an npz file or a fold"),
    "text for a number": (f"{S_AND_R} --splits ten", 2, "argument --splits: invalid int value: 'ten'"),
    "batch 0": (f"{S_AND_R} --batch-size 0", 2, "batch is 0, expected 1 or more"),
    "one group": (f"{S_AND_R} --groups 1", 2, "groups is 1, expected 2 or more, or 0 for no error bars"),
    "negative number": (f"{S_AND_R} --num-images -3", 2, "must not be negative"),
    "negative size": (f"{S_AND_R} --image-size -3", 2, "--image-size: '-3' is not 0 to 4096 pixels"),
    "images too large for memory": (f"{S_AND_R} --image-size 100000", 2, "'100000' is not 0 to 4096 pixels"),
    "a reference too large": ("reference --data S --out r.npz --image-size 5000", 2, "'5000' is not 0 to 4096 pixels"),
    "features too large": ("features --data S --out o --image-size 5000", 2, "--image-size must be 8 to 4096"),
    "a sweep too large": ("sweep --model S --reference R --out o --image-size 5000", 2, "'5000' is not 0 to 4096"),
    "seed out of range": (f"{S_AND_R} --seed -1", 2, "--seed is -1, expected 0 to 2^63 - 1"),
    "no features": (f"{S_AND_R} --features=", 2, "features is '', expected inception"),
    "features that are nowhere": (f"{S_AND_R} --features /none", 2, "features is '/none', expected inception"),
    "features without weights": (f"{S_AND_R} --features S", 2, "S has no config.json; expected a folder made by"),
    "a tag that timm lacks": (f"{S_AND_R} --features timm:test_resnet.no", 2, "it has test_resnet.r160_in1k"),
    "no name": (f"{S_AND_R} --features timm:", 2, "timm has no model ''; timm.list_models() names"),
    "size 0": (f"{S_AND_R} --features timm:test_resnet@0", 2, "is '0', expected pixels, as in timm:test_resnet@224"),
    "size 1": (f"{S_AND_R} --features timm:test_resnet@1 --weights random", 2, "is '1', expected pixels, as in"),
    "a size that is no multiple of patches": (f"{S_AND_R} --features timm:test_vit@31 --weights random --groups 0", 2,
                                              "timm:test_vit cannot take images of 31 pixels (Input height (31)"),
    "a size that leaves nothing": (f"{S_AND_R} --features timm:test_convnext@2 --weights random --groups 0", 2,
                                   "images of 2 pixels (Calculated padded input size"),
    "size no ASCII": (f"{S_AND_R} --features timm:test_resnet@\u00b2", 2, "expected pixels, as in"),
    "local model that is none": (f"{S_AND_R} --features local-dir:/none", 2, "features is 'local-dir:/none', expected"),
    "weights in a folder": (f"{S_AND_R} --features timm:test_resnet --weights S", 4, "weights S is a folder without"),
    "labels that are text": (f"{S_AND_R} --sample-labels TEXT", 4, "numbers (it begins with b'1\\n2\\n3"),
    "labels that are none": (f"{S_AND_R} --sample-labels /none", 3, "labels /none do not exist; expected an .npy file"),
    "unknown device": (f"{S_AND_R} --device tpu", 2, "device is 'tpu', expected one of auto, cpu, cuda"),
    "reference of nothing": ("reference --data /none --out r.npz", 3, "/none does not exist"),
    "reference elsewhere": ("reference --data S --out r.json", 2, "--out is r.json, expected FILE.npz"),
    "one image kept": ("reference --data S --out r.npz --keep-images 1 --features timm:test_resnet --weights random", 2,
                       "kept images are 1, expected 2 or more, or 0 for none"),
    "scales that are words": ("sweep --model S --reference R --out o --scales a,b", 2, "--scales is 'a,b', expected"),
    "no scales": ("sweep --model S --reference R --out o --scales ,", 2, "--scales is ',', expected numbers of 0 or"),
    "scales without end": ("sweep --model S --reference R --out o --scales nan,inf", 2, "'nan,inf', expected numbers"),
    "sweep of no model": ("sweep --model /none --reference R --out o", 2, "expected a run directory or a checkpoint"),
    "sweep of one image": ("sweep --model S --reference R --out o --num-images 1", 2, "--num-images must be 2 or more"),
    "no classes": ("features --data S --out o", 3, "S has images directly in it and no class folders"),
    "learning rate 0": ("features --data S --out o --lr 0", 2, "--lr a number of more than 0"),
    "output among the images": ("features --data S --out S/o", 2, "lie in one another; give folders apart"),
} | {
    f"{words}: outputs are tried before the work": (words, 2, says) for words, says in {
        "fid --samples /none --reference /none --json /proc/nowhere/m.json": "cannot be written",
        "fid --samples /none --reference /none --report /proc/nowhere/page.html": "cannot be written",
        "fid --samples /none --reference /none --json FILE/m.json": "cannot be written",
        "fid --samples /none --reference /none --json FOLDER": "expected",
        "fid --samples /none --reference /none --work /proc/nowhere": "cannot be written",
        "fid --samples /none --reference /none --work FILE": "expected",
        "fid --samples /none --reference /none --json same.x --report same.x": "give each its own",
        "reference --data /none --out /proc/nowhere/r.npz": "cannot be written",
        "reference --data /none --out r.npz --work /proc/nowhere": "cannot be written",
        "sweep --model /none --reference /none --out /proc/nowhere/sweep": "cannot be written",
        "sweep --model /none --reference /none --out FILE": "cannot be written",
        "features --data /none --out /proc/nowhere/features": "cannot be written",
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("row", MISTAKES)
def test_a_mistake_is_one_line(called, good, tmp_path, row):
    words, code, says = MISTAKES[row]
    os.symlink(good / "samples", tmp_path / "S")
    os.symlink(good / "reference", tmp_path / "R")
    (tmp_path / "TEXT").write_text("1\n2\n3\n")
    (tmp_path / "FILE").touch()
    (tmp_path / "FOLDER").mkdir()
    called(row, words, code, says)
    assert {path.name for path in tmp_path.iterdir()} == {"R", "S", "TEXT", "FILE", "FOLDER"}, "nothing is left behind"


NOT_OURS = {"F6": "images and statistics are npz, whose checksums are read; a bare .npy of them is refused"}


def test_every_number_is_tried_or_none_of_ours():
    assert numbers("F", [*REFERENCES, *SAMPLES, *COVARIANCES, *WEIGHTS, "F40 ", "F41 "], NOT_OURS) == []
