"""Bad token sets and runs, as a user may meet them: the command ends with the exit code, in one line that says what is
wrong. Images, npz files and strangers' weights have such rows in tests of their own."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.score import record

from mutor_vision.storage.seal import write_sealed


def edit(**changes):
    """Another manifest, sealed as one that was made so."""

    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["seal"]
        write_sealed(folder / "manifest.json", manifest | changes)

    return damage


def edit_shard(**changes):
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["seal"]
        manifest["shards"][0] |= changes
        write_sealed(folder / "manifest.json", manifest)

    return damage


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def without(name):
    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def shard(array, name="codes-00000.npy"):
    """Another array in a shard whose hash is in the manifest, as of a set that was made wrongly."""

    def damage(folder):
        from mutor_vision.storage.files import sha256

        old = np.load(folder / name)
        with open(folder / name, "wb") as file:
            np.save(file, array(old), allow_pickle=True)
        key = "labels_sha256" if name.startswith("labels") else "sha256"
        edit_shard(**{key: sha256(folder / name)})(folder)

    return damage


def cut(name, size=-50):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def flip(name, place=-3):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 4
        (folder / name).write_bytes(content)

    return damage


def swap(one, other):
    def damage(folder):
        (folder / one).rename(folder / "x")
        (folder / other).rename(folder / one)
        (folder / "x").rename(folder / other)

    return damage


def put(value):
    def change(array):
        array[3] = value
        return array

    return change


def pipe(folder):
    (folder / "codes-00000.npy").unlink()
    os.mkfifo(folder / "codes-00000.npy")


# Row of the catalogue -> damage, exit code, what the line says.
TOKEN_SETS = {
    "B1 no manifest": (without("manifest.json"), 2, "neither config.json nor manifest.json"),
    "B2 manifest empty": (text("manifest.json", ""), 4, "is not complete JSON"),
    "B2 manifest cut": (cut("manifest.json"), 4, "is not complete JSON"),
    "B2 manifest a list": (text("manifest.json", "[]"), 4, "expected an object"),
    "B2 manifest nested": (text("manifest.json", "[" * 100_000), 4, "nested too deeply"),
    "B2 manifest no UTF-8": (lambda f: (f / "manifest.json").write_bytes(b'{"\xff": 1}'), 4, "is not complete JSON"),
    "B3 newer format": (text("manifest.json", '{"format": 9}'), 5, "format 9, this version reads up to 2"),
    "B5 shard missing": (without("codes-00001.npy"), 4, "codes-00001.npy is missing"),
    "B6 extra shard": (text("codes-00012.npy", "x"), 0, "complete and verified"),
    "B7 shard cut": (cut("codes-00000.npy"), 4, "is damaged"),
    "B8 bit flipped": (flip("codes-00001.npy"), 4, "is damaged"),
    "B9 shards swapped": (swap("codes-00000.npy", "codes-00001.npy"), 4, "is damaged"),
    "B10 labels of another shard": (swap("labels-00000.npy", "labels-00001.npy"), 4, "is damaged"),
    "B11 zeros at the end": (
        lambda f: (f / "codes-00000.npy").write_bytes((f / "codes-00000.npy").read_bytes()[:-64] + bytes(64)), 4,
        "is damaged"),
    "B12 leftover": (text(".codes-00000.npy.partial", "x"), 0, "complete and verified"),
    "B13 code too large": (shard(put(32)), 4, "holds code 32, expected 0 to 31"),
    "B14 code negative": (shard(lambda a: a.astype(np.int16) - 99), 4, "holds int16"),
    "B15 bytes": (shard(lambda a: a.astype(np.uint8)), 4, "holds uint8"),
    "B16 codebook too large": (edit(codebook_size=70_000), 4, "expected uint32"),
    "B17 big-endian": (shard(lambda a: a.astype(">u2")), 4, "holds >u2"),
    "B18 objects": (shard(lambda a: np.array([print, 3], dtype=object)), 4, "is not a complete .npy file"),
    "B19 Fortran order": (shard(np.asfortranarray), 0, "complete and verified"),
    "B20 another grid": (edit(grid=[24, 24]), 4, "expected uint16 (30, 2, 576)"),
    "B20 grid of one side": (edit(grid=[16]), 4, "no grid of two sides"),
    "B21 rows as squares": (shard(lambda a: a.reshape(30, 2, 4, 4)), 4, "holds uint16 (30, 2, 4, 4)"),
    "B22 fewer labels": (shard(lambda a: a[:-1], "labels-00000.npy"), 4, "expected int64 (30,)"),
    "B23 label too large": (shard(put(5), "labels-00000.npy"), 4, "holds label 5, expected 0 to 4"),
    "B24 label negative": (shard(put(-100), "labels-00000.npy"), 4, "holds label"),
    "B24 labels of int32": (shard(lambda a: a.astype(np.int32), "labels-00000.npy"), 4, "holds int32"),
    "B35 other count": (edit_shard(images=31), 4, "expected uint16 (31, 2, 16)"),
    "B35 count is text": (edit_shard(images="30"), 4, "'shards.0.images' is 30, expected a whole number"),
    "B35 no shards": (edit(shards=[]), 4, "or no shards"),
    "B43 absolute name": (edit_shard(file="/etc/passwd"), 4, "it is refused"),
    "B45 name above": (edit_shard(labels_file="../labels-00000.npy"), 4, "it is refused"),
    "B46 a file twice": (edit_shard(file="codes-00001.npy"), 4, "it is refused"),
    "B47 shard a folder": (lambda f: (without("codes-00000.npy")(f), (f / "codes-00000.npy").mkdir()), 4, "is missing"),
    "B47 shard a pipe": (pipe, 4, "is missing"),
    "tokenizer gone": (without("tokenizer"), 2, "tokenizer does not exist"),
    "tokenizer's weights flipped": (flip("tokenizer/model.safetensors"), 4, "is damaged"),
    "tokenizer's settings flipped": (flip("tokenizer/config.json", 60), 4, "is damaged"),
    "keys missing": (text("manifest.json", '{"format": 1}'), 4, "lacks 'tokenizer_sha256'"),
    "names are no text": (edit(class_names=[1, 2]), 4, "'class_names.0' is 1, expected text"),
    "views are no list": (edit(views="center"), 4, "'views' is center, expected a list"),
}  # fmt: skip


def checked(promise, row, done, code, words):
    said = done.out + done.err
    held = done.code == code and words in said and "Traceback" not in said and done.err.count("\n") <= 1
    record(promise, row, int(held), 1)
    assert held, said


@pytest.mark.parametrize("row", TOKEN_SETS)
def test_a_bad_token_set(command, token_set_path, tmp_path, row):
    damage, code, words = TOKEN_SETS[row]
    damage(Path(shutil.copytree(token_set_path, tmp_path / "set")))
    checked("Bad token sets are told", row, command("mutor", "info", tmp_path / "set"), code, words)


LAST, BEFORE = "checkpoints/step-0000010", "checkpoints/step-0000005"


def both(damage_of):
    """The same damage to both checkpoints, so that none is left."""
    return lambda run: [damage_of(step)(run) for step in (LAST, BEFORE)]


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


CHECKPOINTS = {
    "C2 no checkpoint": (without("checkpoints"), 2, "holds no checkpoint"),
    "C3 empty weights": (both(lambda step: text(f"{step}/model.safetensors", "")), 4, "no checkpoint is whole"),
    "C6 cut": (both(lambda step: cut(f"{step}/model.safetensors")), 4, "bytes, expected"),
    "C7 bit flipped": (both(lambda step: flip(f"{step}/ema.safetensors")), 4, "is damaged: sha256"),
    "C7 the newest flipped": (flip(f"{LAST}/ema.safetensors"), 0, "stepping over a damaged checkpoint"),
    "C8 a pickle": (both(lambda step: lambda run: torch.save(Harmful(), run / step / "training.pt")), 4, "training.pt"),
    "C36 no MANIFEST": (both(lambda step: without(f"{step}/MANIFEST.json")), 4, "has no MANIFEST.json"),
    "C36 a file missing": (both(lambda step: without(f"{step}/training.pt")), 4, "training.pt is missing"),
    "C36 a file too many": (both(lambda step: text(f"{step}/other.safetensors", "x")), 4, "is not listed"),
    "C37 files of different steps": (swap(f"{LAST}/ema.safetensors", f"{BEFORE}/ema.safetensors"), 4, "is damaged"),
    "C39 a partial one alone": (lambda run: (without(LAST)(run), (run / BEFORE).rename(run / f"{BEFORE}.partial")), 2,
                                "holds no checkpoint"),
    "C40 other names": (lambda run: [(run / f"checkpoints/{name}").mkdir() for name in ("step-1.bak", "step-1e2", "x")],
                        0, "images of"),
    "C41 renamed": (lambda run: (without(BEFORE)(run), (run / LAST).rename(run / "checkpoints/step-0000020")), 4,
                    "is the checkpoint of step 10, renamed"),
    "MANIFEST odd": (both(lambda step: text(f"{step}/MANIFEST.json", "[]")), 4, "expected an object"),
    "MANIFEST of later format": (both(lambda step: text(f"{step}/MANIFEST.json", '{"format": 3}')), 5, "has format 3"),
    "config odd": (both(lambda step: text(f"{step}/config.json", "{}")), 4, "config.json has 2 bytes"),
    "tokenizer gone": (without("tokenizer"), 2, "has no tokenizer"),
    "tokenizer flipped": (flip("tokenizer/model.safetensors"), 4, "is damaged: sha256"),
    "token_set.json changed": (flip("token_set.json", 40), 4, "token_set.json"),
    "token_set.json gone": (without("token_set.json"), 2, "has no token_set.json"),
}  # fmt: skip


@pytest.mark.parametrize("row", CHECKPOINTS)
def test_a_bad_run(command, trained_run, tmp_path, row):
    damage, code, words = CHECKPOINTS[row]
    damage(Path(shutil.copytree(trained_run, tmp_path / "run")))
    done = command("mutor", "sample", tmp_path / "run", "--per-class", 1, "--classes", 0, "--out", tmp_path / "x.png")
    checked("Bad checkpoints are told", row, done, code, words)
