"""Files and names from strangers that try to run code, to leave their folder, or to make a small file do large work:
each is given to the command that a person would call. It refuses in one line, or leaves out what is harmful; nothing in
the file runs, nothing outside of --out is written, no program is started, and memory stays small."""

import argparse
import html.parser
import http.client
import io
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import tarfile
import threading
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.memory import little_memory, memory_used
from faults.score import record
from PIL import Image
from safetensors.torch import save_file

from mutor_vision.storage.seal import write_manifest, write_sealed

LARGEST = 400_000_000  # bytes that a command may use for one of these files, all of them below 2 MB
LONGEST = 4_020  # characters of an error
FD = ("--features", "timm:test_resnet@32", "--groups", 0, "--metrics", "fid")


class Place:
    """Where a row is tried: `files` for what strangers made, `out` for results, and a canary that only code makes."""

    def __init__(self, folder, sources):
        self.folder, self.sources = folder, sources
        self.files, self.out, self.canary = folder / "files", folder / "out", folder / "canary"
        for path in (self.files, self.out, folder / "here", folder / "elsewhere"):
            path.mkdir()
        (folder / "elsewhere" / "precious.txt").write_text("precious")

    def copy(self, name):
        """A run, token set, tokenizer or folder of images of our own, to be changed."""
        return Path(shutil.copytree(self.sources[name], self.files / name, copy_function=shutil.copyfile))

    def outside(self):
        """Everything but what is in `out`: name -> what it is, and its content."""
        found = {str(path): None for path in self.folder.parent.iterdir()}
        for path in self.folder.rglob("*"):
            if self.out not in path.parents:
                content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
                found[str(path)] = (path.lstat().st_mode, content)
        return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory, trained_run, token_set_path, tiny_tokenizer_path):
    """Good things of every kind, each the smallest that commands take."""
    folder = tmp_path_factory.mktemp("sources")
    run = Path(shutil.copytree(trained_run, folder / "run"))
    for extra in ("checkpoints/step-0000005", "samples", "tensorboard"):
        shutil.rmtree(run / extra, ignore_errors=True)
    generator = np.random.default_rng(0)
    pixels = generator.integers(256, size=(12, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / "images" / ("ant" if number < 6 else "bee") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(folder / "images.npz", 255 - pixels)
    return {"run": run, "set": token_set_path, "tokenizer": tiny_tokenizer_path, "images": folder / "images",
            "npz": folder / "images.npz"}  # fmt: skip


@pytest.fixture
def place(tmp_path, sources, monkeypatch):
    place = Place(tmp_path, sources)
    monkeypatch.chdir(tmp_path / "here")
    return place


@pytest.fixture
def tried(place, command, monkeypatch):
    """tried(row, words, codes, says): the command is called, all is checked, and the row recorded -> Finished."""
    started = []

    def refused(*arguments, **settings):
        started.append(str(arguments[:2]))
        raise OSError("no program is started and no host is asked")

    def run(row, words, codes, *says):
        before = place.outside()
        with monkeypatch.context() as patch, little_memory(2**32), memory_used() as used:
            patch.setattr(subprocess.Popen, "__init__", refused)
            patch.setattr(socket, "getaddrinfo", refused)
            done = command(*words)
        said, changed = done.out + done.err, []
        for path, what in place.outside().items():
            if before.get(path, "new") != what:
                changed.append(path)
        codes = codes if isinstance(codes, tuple) else (codes,)
        problems = {
            "exit code": done.code not in codes,
            "text": not all(text in said for text in says),
            "traceback": "Traceback" in said,
            "lines": done.code != 0 and (done.err.count("\n") != 1 or not done.err.startswith("error")),
            "characters": bool(harmful(said)) or len(done.err) > LONGEST,
            "ran": place.canary.exists(),
            "written": bool(changed or before.keys() - place.outside().keys()),
            "started": bool(started),
            "memory": used[0] > LARGEST,
        }
        problems = [name for name, found in problems.items() if found]
        record("Hostile files are refused", row, int(not problems), 1)
        assert not problems, (problems, done.code, said[:3000], changed, started, f"{used[0]:,} bytes")
        return done

    return run


def harmful(text):
    """Characters that a terminal obeys."""
    marks = "\u202a\u202b\u202d\u202e\u2066\u2067\u2068"
    return [c for c in text if (unicodedata.category(c) == "Cc" and c not in "\n\r\t") or c in marks]


# ---- pickles


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class SetsState:
    def __init__(self, path):
        self.path = str(path)

    def __setstate__(self, state):
        Path(state["path"]).touch()


PAYLOADS = {
    "os.system": lambda canary: Calls(os.system, f"touch {canary}"),
    "exec": lambda canary: Calls(exec, f"open({str(canary)!r}, 'w')"),
    "eval": lambda canary: Calls(eval, f"open({str(canary)!r}, 'w')"),
    "open": lambda canary: Calls(open, str(canary), "w"),
    "Popen": lambda canary: Calls(subprocess.Popen, ("touch", str(canary))),
    "__setstate__": SetsState,
    "numpy": lambda canary: np.array([Calls(os.system, f"touch {canary}")], dtype=object),
    "Namespace": lambda canary: argparse.Namespace(x=Calls(os.system, f"touch {canary}")),
}
FORMATS = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "raw": lambda value, path: path.write_bytes(pickle.dumps(value)),
}
TRAIN_TOKENIZER = (
    "mutor", "train-tokenizer", "--preset", "digits", *(word for name, value in {
        "model.image_size": 16, "model.channels": "8,8,8", "model.latent_channels": 8, "model.code_dim": 4,
        "model.codebook_size": 32, "model.norm_groups": 4, "model.attention": "false", "batch_size": 4, "workers": 0,
        "steps": 1, "warmup_steps": 0,
    }.items() for word in ("--set", f"{name}={value}")),
)  # fmt: skip


def train_tokenizer(place, *settings):
    words = (word for setting in settings for word in ("--set", setting))
    return (*TRAIN_TOKENIZER, "--data", place.sources["images"], "--out", place.out / "vq", *words)


def reseal(folder):
    """MANIFEST.json as one who made the files so would write it."""
    (folder / "MANIFEST.json").unlink()
    write_manifest(folder, step=int(folder.name.removeprefix("step-")))


def resumed(place, write, name=""):
    run = place.out / "run"  # a run that is continued is written to
    shutil.copytree(place.sources["run"], run, copy_function=shutil.copyfile)
    write(run / "checkpoints" / "step-0000010" / "training.pt")
    reseal(run / "checkpoints" / "step-0000010")
    return ("mutor", "train", "--preset", "hostile", "--codes", place.sources["set"], "--out", run)


def weights_file(words):
    """A command that reads a stranger's file of weights."""

    def build(place, write, name="weights.pt"):
        write(place.files / name)
        return words(place, place.files / name)

    return build


def fid(place, *more, samples=None, reference=None):
    return ("mutor", "fid", "--samples", samples or place.sources["npz"], "--reference",
            reference or place.sources["images"], *FD, *more)  # fmt: skip


READERS = {
    "convert": weights_file(lambda place, file: ("mutor", "convert", file, place.out / "converted")),
    "convert --tokenizer": weights_file(lambda place, file: (
        "mutor", "convert", gpt(place), place.out / "converted", "--tokenizer", file)),
    "train (training.pt)": resumed,
    "lpips_weights": weights_file(lambda place, file: train_tokenizer(
        place, "lpips_weight=1", f"lpips_weights={file}")),
    "perceptual_weights": weights_file(lambda place, file: train_tokenizer(
        place, "perceptual_weight=1", "perceptual_network=timm:test_resnet", f"perceptual_weights={file}")),
    "fid --weights": weights_file(lambda place, file: fid(place, "--weights", file)),
    "fid, Inception": weights_file(lambda place, file: (
        "mutor", "fid", "--samples", place.sources["npz"], "--reference", place.sources["images"], "--weights", file,
        "--allow-unknown-weights")),
    "fid --also": weights_file(lambda place, file: fid(
        place, "--weights", "random", "--also", f"timm:test_vit={file}")),
    "encode --features": weights_file(lambda place, file: (
        "mutor", "encode", "--tokenizer", place.sources["tokenizer"], "--data", place.sources["images"], "--out",
        place.out / "set", "--workers", 0, "--features", "timm:test_vit@32", "--features-weights", file)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_preset(monkeypatch, request):
    """The settings of the run in `sources`, so that `mutor train` continues it."""
    from mutor_vision.presets import TRANSFORMERS

    monkeypatch.setitem(TRANSFORMERS, "hostile", request.getfixturevalue("train_config"))


def gpt(place):
    """A tiny LlamaGen transformer, from a run of ours."""
    from mutor_vision.interop.convert import convert_back

    if not (path := place.files / "gpt.pt").exists():
        convert_back(place.sources["run"], path, say=lambda line: None)
    return path


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_is_not_run(reader, payload, place, tried, monkeypatch):
    for number, (name, save) in enumerate(FORMATS.items()):
        # What switches torch's own safety off wherever weights_only is not given.
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1" if number < 2 else "0")
        evil = {"model": {"w": torch.zeros(3)}, "args": PAYLOADS[payload](place.canary)}
        words = READERS[reader](place, lambda path, save=save, evil=evil: save(evil, path))
        tried(f"{reader}: {payload}, {name}", words, 4)
        shutil.rmtree(place.out)
        place.out.mkdir()


# ---- weights that claim more than they hold


def numbers_claimed(count):
    """Where a pickle of torch.zeros(1000) says 1000, it now says `count`."""

    def write(save):
        def to(path):
            save({"w": torch.zeros(1000)}, path)
            content = path.read_bytes()
            if not zipfile.is_zipfile(path):
                path.write_bytes(content.replace(b"M\xe8\x03", b"J" + struct.pack("<i", count)))
                return
            with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w") as new:
                for info in old.infolist():
                    part = old.read(info)
                    if info.filename.endswith("data.pkl"):
                        part = part.replace(b"M\xe8\x03", b"J" + struct.pack("<i", count))
                    new.writestr(info.filename, part)

        return to

    return write


def header_of(values, length=None, data=bytes(16)):
    """A safetensors file of this header."""
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", length or len(text)) + text + data)


def tensor(shape, begin, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def itself():
    content = {"step": 10, "model": {}}
    content["model"]["model"] = content
    return content


def doubled(times):
    return {"a": (inner := doubled(times - 1)), "b": inner} if times else {}


def wide(depth, width):
    return dict.fromkeys(range(width), wide(depth - 1, width)) if depth else 0


ZIP, LEGACY = FORMATS["zip"], FORMATS["legacy"]
WEIGHTS = {
    "stride 0": (".pt", lambda path: ZIP({"w": torch.zeros(1).expand(10**10)}, path)),
    "stride 0, legacy": (".pt", lambda path: LEGACY({"w": torch.zeros(1).expand(10**10)}, path)),
    "stride 0, deep inside": (".pt", lambda path: ZIP(
        {"step": 10, "optimizer": {"state": {0: {"exp_avg": torch.zeros(1).expand(10**10)}}}}, path)),
    "numbers that are not there": (".pt", numbers_claimed(2**31 - 1)(ZIP)),
    "the same, legacy": (".pt", numbers_claimed(2**31 - 1)(LEGACY)),
    "sparse": (".pt", lambda path: ZIP({"w": torch.eye(3).to_sparse()}, path)),
    "sparse, legacy": (".pt", lambda path: LEGACY({"w": torch.eye(3).to_sparse()}, path)),
    "without data": (".pt", lambda path: LEGACY({"w": torch.zeros(10**9, device="meta")}, path)),
    "quantised": (".pt", lambda path: LEGACY(
        {"w": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.quint8)}, path)),
    "lists in lists": (".pt", lambda path: path.write_bytes(
        b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")),
    "a list that holds itself": (".pt", lambda path: ZIP(itself(), path)),
    "a list twice in a list, 60 times": (".pt", lambda path: ZIP({"step": 10, "model": doubled(60)}, path)),
    "10^12 entries": (".pt", lambda path: ZIP({"step": 10, "model": wide(3, 10_000)}, path)),
    "header of 2^60 bytes": (".safetensors", header_of(b"{}", 2**60)),
    "header that is nested": (".safetensors", header_of(b"[" * 100_000)),
    "50,000 entries": (".safetensors", header_of({str(n): tensor([0], 0, 0) for n in range(50_000)}, data=b"")),
    "entries that overlap": (".safetensors", header_of({"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)})),
    "entry of 2^62 numbers": (".safetensors", header_of({"a": tensor([2**31, 2**31], 0, 16)})),
    "entry behind the end": (".safetensors", header_of({"a": tensor([4], 2**40, 2**40 + 16)})),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_are_none_are_refused_before_they_take_memory(what, place, tried):
    ending, write = WEIGHTS[what]
    readers = ("convert", "fid --weights", "lpips_weights", "train (training.pt)")
    readers = readers if ending == ".pt" else readers[: 1 if "entries" in what else 3]
    for reader in readers:
        words = READERS[reader](place, write, f"weights{ending}")
        tried(f"{reader}: {what}", words, (4, 5))
        shutil.rmtree(place.out)
        place.out.mkdir()


def moments(shape):
    return {"step": torch.tensor(1.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}


STATES = {
    "a list": [1], "no step": {"optimizer": {}}, "a step that is text": {"step": "10"}, "no optimizer": {"step": 10},
    "an optimizer that is a list": {"step": 10, "optimizer": [1]},
    "no groups": {"step": 10, "optimizer": {"state": {}}},
    "groups of another model": {"step": 10, "optimizer": {"state": {}, "param_groups": [{"params": [0]}]}},
    "moments of another model": None,
}  # fmt: skip


@pytest.mark.parametrize("what", STATES)
def test_a_training_state_of_another_form(what, place, tried):
    def write(path):
        state = STATES[what]
        if state is None:
            state = torch.load(path, weights_only=True)
            state["optimizer"]["state"][0] = moments((1, 1))
        torch.save(state, path)

    tried(f"train (training.pt): {what}", resumed(place, write), 4)


def distributed(place):
    folder = place.files / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Calls(os.system, f"touch {place.canary}")))
    return folder


def parts(*names):
    def build(place):
        folder = place.files / "parts"
        folder.mkdir()
        save_file({"w": torch.zeros(3)}, place.files / "outside.safetensors")
        weight_map = {str(number): name for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return build


FOLDERS = {
    "distributed checkpoint": (distributed, 4), "part above": (parts("../outside.safetensors"), 4),
    "absolute part": (parts("/etc/passwd"), 4), "part with a zero": (parts("a\0b.safetensors"), 4),
    "part with no name": (parts(""), 4), "part that is the folder": (parts("."), 4),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_of_weights(what, place, tried):
    build, code = FOLDERS[what]
    tried(f"convert: {what}", ("mutor", "convert", build(place), place.out / "x"), code)


@pytest.mark.parametrize("words", [("sample", "--out", "x.png"), ("info",), ("export", "x"), ("merge", "x")])
def test_a_distributed_checkpoint_is_no_run(words, place, tried):
    name, *more = (place.out / word if word.startswith("x") else word for word in words)
    tried(f"{name}: distributed checkpoint", ("mutor", name, distributed(place), *more), (2, 3, 4))


# ---- arrays


def npy(shape=(12, 16, 16, 3), data=b"", descr="'|u1'", header=None):
    text = header or f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + data


def zipped(members, method=zipfile.ZIP_DEFLATED):
    def write(path):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    return write


def objects(canary):
    return np.array([Calls(os.system, f"touch {canary}")], dtype=object)


def zip_bytes(members):
    file = io.BytesIO()
    zipped(members)(file)
    return file.getvalue()


GOOD = npy(data=np.random.default_rng(0).integers(256, size=(12, 16, 16, 3), dtype=np.uint8).tobytes())
CODE = "__import__('os').system('touch ../canary')"
NPZ = {
    "objects": (lambda place, path: np.savez(path, objects(place.canary)), 4),
    "objects for labels": (lambda place, path: np.savez(path, arr_1=objects(place.canary)), 4),
    "raw pickle": (lambda place, path: FORMATS["raw"](Calls(os.system, f"touch {place.canary}"), path), 4),
    "pickle for an array": (lambda place, path: zipped(
        {"arr_0.npy": pickle.dumps(Calls(os.system, f"touch {place.canary}"))})(path), 4),
    "header that is code": (lambda place, path: zipped({"arr_0.npy": npy(header=CODE)})(path), 4),
    "type that is code": (lambda place, path: zipped({"arr_0.npy": npy(descr=CODE)})(path), 4),
    "header of brackets": (lambda place, path: zipped({"arr_0.npy": npy(header="(" * 9_000)})(path), 4),
    "1 GB in 1 MB": (lambda place, path: zipped({"arr_0.npy": npy((5_000, 256, 256, 3), bytes(2**28))})(path), 4),
    "shape of 2^60": (lambda place, path: zipped({"arr_0.npy": npy((2**30, 2**28, 4, 3))})(path), 4),
    "labels that unpack": (lambda place, path: zipped(
        {"arr_0.npy": GOOD, "arr_1.npy": npy((2**25,), bytes(2**28), "'<i8'")})(path), 4),
    "protocol that unpacks": (lambda place, path: zipped(
        {"arr_0.npy": GOOD, "protocol_json.npy": npy((2**26,), b"[" * 2**26)})(path), 4),
    "protocol that is nested": (lambda place, path: zipped(
        {"arr_0.npy": GOOD, "protocol_json.npy": npy((100_000,), b"[" * 100_000)}, zipfile.ZIP_STORED)(path), 4),
    "member above": (lambda place, path: zipped({"arr_0.npy": GOOD, "../../x.npy": GOOD})(path), 4),
    "absolute member": (lambda place, path: zipped({"arr_0.npy": GOOD, "/tmp/x.npy": GOOD})(path), 4),
    "member of a drive": (lambda place, path: zipped({"arr_0.npy": GOOD, "C:\\x.npy": GOOD})(path), 4),
    "long name": (lambda place, path: zipped({"arr_0.npy": GOOD, "../" + "x" * 60_000: GOOD})(path), 4),
    "name that the terminal obeys": (lambda place, path: zipped({"../\x1b]0;owned\x07\u202e.npy": GOOD})(path), 4),
    "zip in a zip": (lambda place, path: zipped({"arr_0.npy": zip_bytes({"arr_0.npy": GOOD})})(path), 4),
    "encrypted": (lambda place, path: path.write_bytes(encrypted(zip_bytes({"arr_0.npy": GOOD}))), 4),
}  # fmt: skip


def encrypted(content):
    content = bytearray(content)
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


@pytest.mark.parametrize("what", NPZ)
def test_an_npz(what, place, tried):
    build, code = NPZ[what]
    build(place, path := place.files / "x.npz")
    npz = place.sources["npz"]
    if "labels" in what and what.startswith("objects"):  # beside good images
        zipped({"arr_0.npy": GOOD, "arr_1.npy": zipfile.ZipFile(path).read("arr_1.npy")})(path)
        code = (0, 4)  # what is no array of numbers is left out
    for flag, words in (
        ("--samples", fid(place, "--weights", "random", samples=path)),
        ("--held-out", fid(place, "--weights", "random", "--held-out", path)),
        ("sweep --reference", ("mutor", "sweep", "--model", place.sources["run"], "--reference", path, "--out",
                               place.out / "sweep", "--num-images", 4, "--scales", "1", *FD[:2], "--weights",
                               "random")),
    ):  # fmt: skip
        tried(f"{flag}: {what}", words, code)
    assert npz.exists()


NPY = {
    "objects": lambda place, path: np.save(path, objects(place.canary)),
    "raw pickle": lambda place, path: FORMATS["raw"](Calls(os.system, f"touch {place.canary}"), path),
    "header that is code": lambda place, path: path.write_bytes(npy(header=CODE)),
    "shape of 2^60": lambda place, path: path.write_bytes(npy((2**60,), b"12345678", "'<i8'")),
    "header of brackets": lambda place, path: path.write_bytes(npy(header="(" * 9_000)),
    "an npz": lambda place, path: zipped({"arr_0.npy": GOOD})(path),
    "a pipe": lambda place, path: os.mkfifo(path),
}


@pytest.mark.parametrize("what", NPY)
def test_an_npy(what, place, tried):
    labels, codes = place.files / "labels.npy", place.files / "codes"
    NPY[what](place, labels)
    tried(f"--sample-labels: {what}", fid(place, "--weights", "random", "--sample-labels", labels), (3, 4))
    for name in ("imagenet16_codes", "imagenet16_labels"):
        (codes / name).mkdir(parents=True)
        np.save(codes / name / "0.npy", np.zeros((1, 1) if "labels" in name else (1, 2, 16), np.int64))
    (codes / "imagenet16_codes" / "0.npy").unlink()
    NPY[what](place, codes / "imagenet16_codes" / "0.npy")
    words = ("mutor", "convert", codes, place.out / "set", "--tokenizer", place.sources["tokenizer"])
    tried(f"convert codes: {what}", words, (2, 3, 4, 5))


# ---- images


def chunk(kind, data, length=None):
    return struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(
        ">I", zlib.crc32(kind + data))  # fmt: skip


def png(width, height, extra=b"", *, colour=0, interlaced=0):
    """Of one colour: 0 = grey, 2 = RGB, 6 = RGBA."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    packer, rows = zlib.compressobj(9), []
    steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    for x, y, by_x, by_y in steps if interlaced else [(0, 0, 1, 1)]:
        row = bytes(1 + channels * len(range(x, width, by_x)))
        rows += [packer.compress(row * 64) for _ in range(len(range(y, height, by_y)) // 64)]
        rows.append(packer.compress(row * (len(range(y, height, by_y)) % 64)))
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, interlaced)
    pixels = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_chunk(kind, data):
    """A good image with one more chunk."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(9).integers(256, size=(16, 16, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()[:33] + chunk(kind, data) + file.getvalue()[33:]


def saved(form):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, form)
    return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(%pipe%touch canary) (w) file\nshowpage\n"
FITS = b"".join(card.ljust(80) for card in (
    b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 2", b"NAXIS1  = 99999", b"NAXIS2  = 99999", b"END",
)).ljust(2880)  # fmt: skip
IMAGES = {
    "EPS": ("x.JPEG", lambda: EPS, 3), "SVG": ("x.png", lambda: b"<svg onload='alert(1)'/>", 3),
    "PSD": ("x.JPEG", lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 16, 16, 8, 3) + bytes(12), 3),
    "FITS": ("x.png", lambda: FITS, 3), "ICO": ("x.png", lambda: saved("ICO"), 3), "PDF": (
        "x.jpg", lambda: saved("PDF"), 3), "PCX": ("x.png", lambda: saved("PCX"), 3), "TGA": (
        "x.png", lambda: saved("TGA"), 3), "SGI": ("x.JPEG", lambda: saved("SGI"), 3), "XPM": (
        "x.png", lambda: b'/* XPM */ "16 16 1 1",', 3), "MSP": ("x.JPEG", lambda: b"DanM" + bytes(28), 3),
    "JPEG 2000": ("x.JPEG", lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64), 3),
    "WMF": ("x.JPEG", lambda: b"\xd7\xcd\xc6\x9a\0\0" + bytes(64), 3),
    "HDF5": ("x.png", lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), 3),
    "100 million pixels": ("x.png", lambda: png(10_000, 10_000), 3),
    "88 million of one colour": ("x.png", lambda: png(9_400, 9_400), 3),
    "the same with alpha": ("x.png", lambda: png(9_400, 9_400, colour=6), 3),
    "the same interlaced": ("x.png", lambda: png(9_400, 9_400, interlaced=1), 3),
    "2^62 pixels": ("x.png", lambda: png(16, 16).replace(struct.pack(">II", 16, 16), b"\x7f\xff\xff\xff" * 2), 3),
    "text of 64 MB": ("x.png", lambda: with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26))), 0),
    "profile of 64 MB": ("x.png", lambda: with_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26))), 0),
    "chunk of 4 GB": ("x.png", lambda: png(16, 16, chunk(b"tEXt", b"", 2**32 - 1)), 3),
    "pixels of 4 GB": ("x.png", lambda: png(16, 16).replace(chunk(b"IEND", b""), chunk(b"IDAT", b"", 2**32 - 1)), 3),
    "WEBP of 16383 squared": ("x.webp", lambda: saved("WEBP")[:12] + b"VP8X\n\0\0\0\x10\0\0\0" + b"\xfe\x3f\0" * 2
                              + saved("WEBP")[12:], 3),
    "GIF of 65535 squared": ("x.gif", lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;", 3),
    "TIFF of 2^32 values": ("x.tif", lambda: b"II*\0\x08\0\0\0\1\0\x11\1\4\0\xff\xff\xff\xff\x10\0\0\0" + bytes(64), 3),
    "PPM of 2^40 pixels": ("x.ppm", lambda: b"P6 1048576 1048576 255\n" + bytes(64), 3),
    "BMP of 2^60 pixels": ("x.bmp", lambda: saved("BMP").replace(struct.pack("<ii", 16, 16), b"\xff\xff\xff?" * 2), 3),
}  # fmt: skip


@pytest.mark.parametrize("what", IMAGES)
def test_an_image(what, place, tried, monkeypatch):
    """Ghostscript, which would run the PostScript of an EPS, stands on PATH."""
    name, build, code = IMAGES[what]
    ghost = place.folder / "bin" / "gs"
    ghost.parent.mkdir()
    ghost.write_text(f"#!/bin/sh\ntouch {place.canary}\n")
    ghost.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghost.parent}:{os.environ['PATH']}")
    folder = place.copy("images")
    (folder / "ant" / name).write_bytes(build())
    tried(f"encode: {what}", encode(place, folder), code, name if code else "")
    words = fid(place, "--weights", "random", "--image-size", 16, "--allow-lossy", samples=folder)
    tried(f"fid: {what}", words, code, name if code else "")


def encode(place, data, out="set"):
    return ("mutor", "encode", "--tokenizer", place.sources["tokenizer"], "--data", data, "--out", place.out / out,
            "--workers", 0)  # fmt: skip


# ---- archives


def member(name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def claiming(size):
    """The member's header says another size than it has: a negative one leads back to itself, without an end."""
    info, content = member("ant/x.png", PNG)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (0x80 << 88 | size).to_bytes(12, "big") if size >= 0 else (2**96 + size).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def saying(**headers):
    """The member with headers of its own, by which pax replaces those of tar."""
    return member("ant/x.png", PNG, pax_headers=headers)


def tar_of(path, *members):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            info, content = member(f"{('ant', 'bee')[number % 2]}/{number}.png", PNG)
            tar.addfile(info, io.BytesIO(content))
        for each in members:
            if isinstance(each, bytes):
                tar.fileobj.write(each)
                tar.offset += len(each)
            else:
                tar.addfile(each[0], io.BytesIO(each[1]))
    return path


def shard(path, *members):
    with tarfile.open(path, "w") as tar:
        for info, content in (member("0.png", PNG), *members):
            tar.addfile(info, io.BytesIO(content))
    return path


PNG = with_chunk(b"tEXt", b"a\0b")
RUNS = pickle.dumps(Calls(os.system, "touch ../canary"))
ARCHIVES = {
    "above": (lambda p: tar_of(p, member("../x.png", PNG)), 4),
    "above, inside": (lambda p: tar_of(p, member("ant/../../x.png", PNG)), 4),
    "absolute": (lambda p: tar_of(p, member("/tmp/x.png", PNG)), 4),
    "symbolic link": (lambda p: tar_of(p, member("ant/x.png", type=tarfile.SYMTYPE, linkname="../elsewhere")), 4),
    "link to a folder, then a file in it": (lambda p: tar_of(
        p, member("ant/up", type=tarfile.SYMTYPE, linkname=".."), member("ant/up/x.png", PNG)), 4),
    "hard link": (lambda p: tar_of(p, member("ant/x.png", type=tarfile.LNKTYPE, linkname="/etc/passwd")), 4),
    "device": (lambda p: tar_of(p, member("ant/x.png", type=tarfile.BLKTYPE, devmajor=8)), 4),
    "character device": (lambda p: tar_of(p, member("ant/x.png", type=tarfile.CHRTYPE)), 4),
    "pipe": (lambda p: tar_of(p, member("ant/x.png", type=tarfile.FIFOTYPE)), 4),
    "pax name above": (lambda p: tar_of(p, saying(path="../../x.png")), 4),
    "pax name of 60,000 characters": (lambda p: tar_of(p, saying(path="../" + "x" * 60_000)), 4),
    "pax name that the terminal obeys": (lambda p: tar_of(p, saying(path="../\x1b]0;owned\x07\u202e\nerror: no")), 4),
    "size of 2^60": (lambda p: tar_of(p, claiming(2**60)), 3),
    "size below zero": (lambda p: tar_of(p, claiming(-1024)), 4),
    "size that leads back": (lambda p: tar_of(p, claiming(-512)), 4),
    "pax size below zero": (lambda p: tar_of(p, saying(size="-1024")), 4),
    "pax size that leads back": (lambda p: tar_of(p, saying(size="-1536")), 4),
    "pax size of 2^60": (lambda p: tar_of(p, saying(size=str(2**60))), 3),
    "holes": (lambda p: tar_of(p, saying(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                                            "GNU.sparse.realsize": str(2**60)})), (3, 4)),
    "members that run": (lambda p: shard(p, member("0.cls", b"0"), member("0.pyd", RUNS), member("0.pkl", RUNS),
                                         member("0.pth", RUNS), member("0.pickle", RUNS)), 0),
    "label of a billion": (lambda p: shard(p, member("0.cls", b"1000000000")), (3, 4)),
    "label of 10,000 digits": (lambda p: shard(p, member("0.cls", b"9" * 10_000)), 4),
    "label that is code": (lambda p: shard(p, member("0.cls", b"__import__('os').system('touch ../canary')")), 4),
    "label that is nested": (lambda p: shard(p, member("0.json", b"[" * 100_000)), 4),
    "label of 2 MB": (lambda p: shard(p, member("0.json", b" " * 2**21)), 4),
    "a pipe for the archive": (os.mkfifo, 3),
    "a link to itself": (lambda p: p.symlink_to(p), 3),
}  # fmt: skip


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_archive(what, place, command, forked, tried):
    build, code = ARCHIVES[what]
    build(path := place.files / "images.tar")
    if "size" in what:  # first where a reader without an end is stopped
        assert forked(*encode(place, path), seconds=30).code in (3, 4)
    tried(f"encode, tar: {what}", encode(place, path), code)
    words = ("mutor", "reference", "--data", path, "--out", place.out / "r.npz", "--keep-images", 0, *FD[:2],
             "--weights", "random")  # fmt: skip
    tried(f"reference, tar: {what}", words, code or 4)  # one good image is too few


def parquet(place, name, label):
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = arrow.array(
        [{"bytes": PNG, "path": name}], arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    )
    pq.write_table(
        arrow.table({"image": image, "label": arrow.array([label], arrow.int64())}), place.files / "x.parquet"
    )
    return place.files / "x.parquet"


@pytest.mark.parametrize("name, label, code", [("../../x.png", 0, 0), ("/etc/x.png", 0, 0), ("\x1b]0;x\x07.png", 0, 0),
                                               ("x.png", 10**12, (3, 4)), ("x.png", -1, (3, 4))])  # fmt: skip
def test_a_parquet_file(name, label, code, place, tried):
    tried(f"encode, parquet: {name!r}, {label}", encode(place, parquet(place, name, label)), code)


# ---- names in files, names of files


def manifest(**changes):
    def change(folder):
        values = json.loads((folder / "manifest.json").read_text())
        del values["seal"]
        shards = {key: value for key, value in changes.items() if "file" in key or key == "images"}
        values["shards"][0] |= shards
        write_sealed(folder / "manifest.json", values | {key: changes[key] for key in changes.keys() - shards.keys()})

    return change


def instead(name, make):
    def change(folder):
        (folder / name).unlink()
        make(folder / name)

    return change


SETS = {
    "above": manifest(file="../codes.npy"), "absolute": manifest(file="/etc/passwd"),
    "a zero": manifest(labels_file="labels\0.npy"), "of another machine": manifest(file="\\\\host\\codes.npy"),
    "a scheme": manifest(file="http://evil.example/codes.npy"),
    "that the terminal obeys": manifest(file="\x1b]0;owned\x07\u202e\nerror: no"),
    "60,000 characters": manifest(file="x" * 60_000),
    "10^12 images": manifest(images=10**12), "a grid of 2^62": manifest(grid=[2**31, 2**31]),
    "2^62 codes": manifest(codebook_size=2**62),
    "a link": instead("codes-00000.npy", lambda p: p.symlink_to("/etc/passwd")),
    "a link to zeros": instead("codes-00000.npy", lambda p: p.symlink_to("/dev/zero")),
    "a pipe": instead("labels-00000.npy", os.mkfifo),
    "objects": instead("labels-00000.npy", lambda p: np.save(p, objects("../canary"))),
}  # fmt: skip


@pytest.mark.parametrize("what", SETS)
def test_a_token_set(what, place, tried):
    SETS[what](folder := place.copy("set"))
    tried(f"train --codes: {what}", ("mutor", "train", "--preset", "hostile", "--codes", folder, "--out",
                                     place.out / "run"), 4)  # fmt: skip


def listing(name):
    """MANIFEST.json of a checkpoint names a file elsewhere."""

    def change(step):
        values = json.loads((step / "MANIFEST.json").read_text())
        del values["seal"]
        values["files"][name] = {"bytes": 8, "sha256": "0" * 64}
        write_sealed(step / "MANIFEST.json", values)

    return change


@pytest.mark.parametrize("name", ["../../../elsewhere/precious.txt", "/etc/passwd", "a\0b", "\x1b[2J", "x" * 60_000])
def test_a_checkpoint_names_its_own_files_alone(name, place, tried):
    listing(name)(place.copy("run") / "checkpoints" / "step-0000010")
    words = ("mutor", "sample", place.files / "run", "--per-class", 1, "--out", place.out / "x.png")
    done = tried(f"sample: MANIFEST names {name[:40]!r}", words, 4)
    assert not (place.out / "x.png").exists() and done


SCHEMES = ("pipe:touch ../canary", "http://127.0.0.1/x", "file:///etc/passwd", "s3://bucket/x", "gs://bucket/x.tar")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_no_path(scheme, place, tried):
    from_, run = place.sources, place.sources["run"]
    for row, words in {
        "encode --data": encode(place, scheme),
        "encode --data, tar": encode(place, scheme.removesuffix(".tar") + ".tar"),
        "encode --out": (*encode(place, from_["images"])[:-3], scheme, "--workers", 0),
        "encode --tokenizer": ("mutor", "encode", "--tokenizer", scheme, *encode(place, from_["images"])[4:]),
        "train --codes": ("mutor", "train", "--preset", "hostile", "--codes", scheme, "--out", place.out / "run"),
        "train --out": ("mutor", "train", "--preset", "hostile", "--codes", from_["set"], "--out", scheme),
        "train-tokenizer --out": (*TRAIN_TOKENIZER, "--data", from_["images"], "--out", scheme),
        "sample --out": ("mutor", "sample", run, "--per-class", 1, "--out", f"{scheme}.png"),
        "sample": ("mutor", "sample", scheme, "--per-class", 1, "--out", place.out / "x.png"),
        "fid --samples": fid(place, "--weights", "random", samples=scheme),
        "fid --json": fid(place, "--weights", "random", "--json", scheme),
        "fid --weights": fid(place, "--weights", scheme),
        "reference --out": ("mutor", "reference", "--data", from_["images"], "--out", f"{scheme}.npz", *FD[:2],
                            "--weights", "random"),
        "convert": ("mutor", "convert", scheme, place.out / "x"),
        "convert, to": ("mutor", "convert", gpt(place), scheme),
        "export, to": ("mutor", "export", run, scheme),
        "info": ("mutor", "info", scheme),
    }.items():  # fmt: skip
        tried(f"{row} {scheme}", words, (2, 3, 4))


LINKED = {
    "sample, grid": ("grid.png", lambda place, out: (
        "mutor", "sample", place.sources["run"], "--per-class", 1, "--out", out)),
    "sample, npz": ("set.npz", lambda place, out: (
        "mutor", "sample", place.sources["run"], "--num", 4, "--out", out)),
    "sample, folder": ("set", lambda place, out: (
        "mutor", "sample", place.sources["run"], "--num", 4, "--out", out)),
    "fid --json": ("m.json", lambda place, out: fid(place, "--weights", "random", "--json", out)),
    "fid --report": ("page.html", lambda place, out: fid(place, "--weights", "random", "--report", out)),
    "reference": ("r.npz", lambda place, out: (
        "mutor", "reference", "--data", place.sources["images"], "--out", out, *FD[:2], "--weights", "random")),
    "convert": ("run", lambda place, out: ("mutor", "convert", gpt(place), out)),
    "convert --to": ("x.pt", lambda place, out: ("mutor", "convert", place.sources["run"], out, "--to", "llamagen")),
    "export": ("hub", lambda place, out: ("mutor", "export", place.sources["run"], out)),
    "encode, plan": ("set/plan.json", lambda place, out: encode(place, place.sources["images"])),
    "encode, manifest": ("set/manifest.json", lambda place, out: encode(place, place.sources["images"])),
    "encode, codes": ("set/codes-00000.npy", lambda place, out: encode(place, place.sources["images"])),
    "encode, tokenizer": ("set/tokenizer", lambda place, out: encode(place, place.sources["images"])),
    "train, config": ("run/config.json", lambda place, out: (
        "mutor", "train", "--preset", "hostile", "--codes", place.sources["set"], "--out", out.parent)),
    "train, lock": ("run/lock", lambda place, out: (
        "mutor", "train", "--preset", "hostile", "--codes", place.sources["set"], "--out", out.parent)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
@pytest.mark.parametrize("what", LINKED)
def test_a_link_at_a_temporary_name_is_not_followed(what, kind, place, tried):
    """Planted by another user of a shared directory, before the command begins. A folder stands there, too."""
    name, words = LINKED[what]
    out = place.out / name
    out.parent.mkdir(exist_ok=True)
    planted = out.parent / (".lock" if name.endswith("lock") else f".{out.name}.partial")
    elsewhere = place.folder / "elsewhere"
    planted.symlink_to({"file": elsewhere / "precious.txt", "folder": elsewhere, "nothing": elsewhere / "new"}[kind])
    tried(f"{what}: link to a {kind} at {planted.name}", words(place, out), (0, 2, 4, 7))


# ---- text in names

NAMES = [
    "\x1b]0;owned\x07\x9b2J\u202e", "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>",
    "cat\nerror: a faked line\n```\n# a faked heading",
    '=HYPERLINK("http://evil.example") [x](javascript:alert(1))',
]  # fmt: skip


class Tags(html.parser.HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def harmful(self):
        return [(tag, attributes) for tag, attributes in self.found
                if tag in ("script", "iframe", "object", "svg", "a", "form", "base") or "alert" in str(attributes)
                or any(name.startswith("on") for name in attributes)]  # fmt: skip


def faked(text):
    return [line for line in text.splitlines() if line.startswith(("error: a faked", "# a faked", "```\n# a"))]


@pytest.fixture
def named_run(place):
    """A run on classes of those names, from a token set of such a name."""
    run = place.copy("run")
    facts = json.loads((run / "token_set.json").read_text())
    facts.pop("seal", None)
    write_sealed(run / "token_set.json", facts | {"class_names": NAMES})
    for path in (run / "config.json", run / "checkpoints" / "step-0000010" / "config.json"):
        values = json.loads(path.read_text())
        values["config"]["codes"] = "codes/`<img src=x onerror=alert(1)>` \x1b[2J\nerror: a faked line"
        path.write_text(json.dumps(values | {"mutor_vision": "1\x1b]0;owned\x07\nerror: a faked line"}))
    reseal(run / "checkpoints" / "step-0000010")
    status = {"state": "done", "step": 10, "reason": "\x1b[2J\x9b\nerror: a faked line"}
    (run / "status.json").write_text(json.dumps(status))
    return run


@pytest.fixture
def named_npz(place):
    """Samples with labels and such names for them."""
    protocol = {"extractor": {}, "n": 12, "image_size": [16, 16], "class_names": NAMES}
    text = np.frombuffer(json.dumps(protocol).encode(), np.uint8)
    path = place.files / "<img src=x onerror=alert(1)>\x1b]0;owned\x07\u202e.npz"
    np.savez(path, np.load(place.sources["npz"])["arr_0"], np.arange(12) % 5, protocol_json=text)
    return path


def test_names_in_a_report(named_npz, place, tried):
    page = place.out / "page.html"
    words = fid(place, "--weights", "random", "--report", page, "--json", place.out / "m.json", samples=named_npz,
                reference=named_npz)  # fmt: skip
    done = tried("fid --report: names", words, 0)
    tags = Tags(text := page.read_text())
    assert not tags.harmful() and not faked(done.out) and "default-src 'none'" in text
    assert all(name.split("\n")[0] in tags.text for name in NAMES), "the names are there, as text"
    assert all(tag["src"].startswith("data:image/png;base64,") for kind, tag in tags.found if kind == "img")


def test_names_in_a_model_card(named_run, place, tried):
    tried("export: names", ("mutor", "export", named_run, place.out / "hub"), 0)
    text = (place.out / "hub" / "README.md").read_text()
    outside = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S)  # a fence shows its text as it is
    assert not Tags(outside).harmful() and not harmful(text) and "[x](" not in outside and not faked(text)


def test_names_in_the_page_of_show(named_run, place):
    from mutor_vision.commands.show import serve
    from mutor_vision.runtime import Runtime
    from mutor_vision.sampling.load import load

    path = "runs/</script><img src=x onerror=alert(1)>"
    server = serve({path: load(named_run, Runtime(0, 1, torch.device("cpu"), None))}, port=0)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", "/")
    text = connection.getresponse().read().decode()
    thread.join()
    server.server_close()
    scripts = [tag for tag in Tags(text).harmful() if tag[0] not in ("form",)]
    held = scripts == [("script", {})] and text.count("<script>") == 1 and not harmful(text)
    record("Hostile files are refused", "show: names", int(held), 1)
    assert held and "alert(1)" in text


def test_names_in_printed_lines(named_run, place, tried):
    for row, words, codes in (
        ("info", ("mutor", "info", named_run), 0),
        ("sample", ("mutor", "sample", named_run, "--per-class", 1, "--out", place.out / "x.png"), 0),
        ("sample --class", ("mutor", "sample", named_run, "--classes", "\x1b[2J\nerror: a faked line", "--out",
                            place.out / "y.png"), 2),
        ("plan", ("mutor", "plan", "--run", named_run), (0, 2)),
    ):  # fmt: skip
        done = tried(f"{row}: names", words, codes)
        assert not faked(done.out + done.err), done


def test_names_of_folders_and_images(place, tried):
    folder = place.files / "images \x1b]0;owned\x07\u202e\nerror: a faked line"
    shutil.copytree(place.sources["images"], folder, copy_function=shutil.copyfile)
    (folder / "ant").rename(folder / NAMES[0])
    (folder / "bee").rename(folder / "cat\nerror: a faked line")
    (folder / "x.\x1b[2J\nerror: a faked line").write_text("left out")
    for row, words, codes in (
        ("encode", encode(place, folder), 0), ("info", ("mutor", "info", place.out / "set"), 0),
        ("fid", fid(place, "--weights", "random", samples=folder), 0),
    ):  # fmt: skip
        done = tried(f"{row}: names of folders", words, codes)
        assert not faked(done.out + done.err), done
    (folder / NAMES[0] / "bad \x1b[2J\nerror: a faked line.png").write_text("no image")
    done = tried("encode: name of a bad image", encode(place, folder, "again"), 3)
    assert not faked(done.out + done.err)


def test_names_in_strangers_weights(place, tried):
    torch.save({"\x1b]0;owned\x07\nerror: a faked line.a": torch.zeros(3),
                "\x1b]0;owned\x07\nerror: a faked line.b": torch.zeros(3)}, place.files / "x.pt")  # fmt: skip
    for words in (("mutor", "convert", place.files / "x.pt", place.out / "x"), fid(
            place, "--weights", place.files / "x.pt")):  # fmt: skip
        done = tried(f"{words[1]}: names of tensors", words, (4, 5))
        assert not faked(done.out + done.err)


def test_no_secret_of_the_environment_is_written(place, command, tried, monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MUTOR_SECRET"):
        monkeypatch.setenv(name, "planted-4711")
    resumed(place, lambda path: None)
    shutil.rmtree(place.out / "run")
    for row, words in (
        ("sample", ("mutor", "sample", place.sources["run"], "--num", 4, "--out", place.out / "set.npz")),
        ("export", ("mutor", "export", place.sources["run"], place.out / "hub")),
        ("fid", fid(place, "--weights", "random", "--json", place.out / "m.json", "--report", place.out / "p.html")),
        ("train", ("mutor", "train", "--preset", "hostile", "--codes", place.sources["set"], "--out",
                   place.out / "new")),
        ("encode", encode(place, place.sources["images"])),
    ):  # fmt: skip
        tried(f"{row}: secrets", words, 0)
    written = [path for path in place.out.rglob("*") if path.is_file()]
    assert len(written) > 20 and not [path for path in written if b"planted-4711" in path.read_bytes()]


# ---- the sources

NEVER = {
    "a pickle that may run": r"weights_only\s*=\s*False|pickle\.loads?\(|\bUnpickler\(|allow_pickle\s*=\s*True|joblib",
    "an archive that is extracted": r"\.extractall\(|\.extract\(|unpack_archive",
    "text that is run": r"(?<![\w.])(eval|exec)\(|os\.system|shell\s*=\s*True|yaml\.(unsafe_)?load\(",
    "a server for other machines": r"0\.0\.0\.0",
    "a limit that is taken away": r"MAX_IMAGE_PIXELS\s*=|LOAD_TRUNCATED_IMAGES\s*=",
    "torch.load without weights_only": r"torch\.load\((?![^)]*weights_only=True)",
}


@pytest.mark.parametrize("what", NEVER)
def test_the_sources_hold_none_of(what, root):
    folders = ("mutor_vision", "tokenizers", "train", "eval", "experiments")
    paths = [path for folder in folders for path in (root / folder).rglob("*.py")]
    found = [f"{path}: {line.strip()}" for path in paths for line in path.read_text().splitlines()
             if re.search(NEVER[what], line)]  # fmt: skip
    record("Hostile files are refused", f"sources: {what}", int(not found), 1)
    assert len(paths) > 100 and not found, found
