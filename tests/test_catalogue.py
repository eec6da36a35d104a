"""Bad token sets, as a user may meet them: the command ends with the exit code, in one line that says what is wrong."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from faults.rows import cut, flip, nothing, numbers, png, swap, text, tried, weights, without, words_of

from mutor_vision.storage.seal import write_sealed
from mutor_vision.tokenizer.model import tokenizer_identity


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
    "B48 read-only": (lambda f: [path.chmod(0o555 if path.is_dir() else 0o444) for path in (f, *f.rglob("*"))], 0,
                      "complete and verified"),
    "tokenizer gone": (without("tokenizer"), 2, "tokenizer does not exist"),
    "tokenizer's weights flipped": (flip("tokenizer/model.safetensors"), 4, "is damaged"),
    "tokenizer's settings flipped": (flip("tokenizer/config.json", 60), 4, "is damaged"),
    "keys missing": (text("manifest.json", '{"format": 1}'), 4, "lacks 'tokenizer_sha256'"),
    "names are no text": (edit(class_names=[1, 2]), 4, "'class_names.0' is 1, expected text"),
    "views are no list": (edit(views="center"), 4, "'views' is center, expected a list"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_preset(monkeypatch, train_config):
    """`mutor train --preset own` has the settings of the tests' run."""
    from mutor_vision.presets import TRANSFORMERS

    monkeypatch.setitem(TRANSFORMERS, "own", train_config)


@pytest.fixture
def called(command, tmp_path, tiny_tokenizer_path):
    def call(row, words, code, says):
        places = {"set": tmp_path / "set", "run": tmp_path / "run", "out": tmp_path / "out", "folder": tmp_path,
                  "tokenizer": tiny_tokenizer_path}  # fmt: skip
        tried("Bad token sets are told", row, command, ["mutor", *words_of(words, **places)], code, says)

    return call


@pytest.mark.parametrize("row", TOKEN_SETS)
def test_a_bad_token_set(called, token_set_path, tmp_path, row):
    damage, code, says = TOKEN_SETS[row]
    damage(Path(shutil.copytree(token_set_path, tmp_path / "set")))
    called(row, "info {set}", code, says)


def other_tokenizer(folder):
    weights(lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})(folder / "set/tokenizer")


def named_anew(folder):
    edit(tokenizer_sha256=tokenizer_identity(folder / "set/tokenizer"))(folder / "set")


def other_names(folder):
    shutil.copytree(folder / "set", folder / "other")
    edit(class_names=["bee", "ant", "cat", "dog", "eel"])(folder / "other")


def archive(*names, mode="w", end=None):
    """A tar archive of images and labels, or its bytes up to `end`."""

    def make(folder):
        with tarfile.open(folder / "images.tar", mode) as tar:
            for seed, name in enumerate(names):
                content = b"1" if name.endswith(".cls") else png(seed)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        (folder / "images.tar").write_bytes((folder / "images.tar").read_bytes()[:end])

    return make


def llamagen_codes(folder):
    for name, value in (("codes", np.zeros((1, 2, 16), np.int64)), ("labels", np.zeros(1, np.int64))):
        (folder / f"llamagen/x_{name}").mkdir(parents=True)
        np.save(folder / f"llamagen/x_{name}/0.npy", value)


TRAIN = "train --preset own --codes {set} --out {out} "
TAR = "encode --tokenizer {tokenizer} --data {folder}/images.tar --out {out} --workers 0"
IN_FOLDERS = ("ant/0.png", "ant/1.png", "bee/2.png", "bee/3.png")
# Row -> damage to the folder that holds the set, the command's words, exit code, what the line says.
OF_COMMANDS = {
    "B20 another grid than the settings'": (nothing, TRAIN + "--set model.grid=24,24", 5, "model.grid is (24, 24), bu"),
    "B25 other number of classes": (nothing, TRAIN + "--set model.num_classes=100", 5, "model.num_classes is 100, but"),
    "B26 classes in another order": (other_names, TRAIN + "--val-codes {folder}/other", 5, "differ in tokenizer or cl"),
    "B27 codes of another tokenizer": (lambda f: (other_tokenizer(f), named_anew(f)), TRAIN + "--init {run}", 5,
                                       "was trained on codes of tokenizer"),
    "B28 a tokenizer of other weights": (other_tokenizer, TRAIN, 5, "is tokenizer"),
    "B29 other codebook": (nothing, TRAIN + "--set model.vocab_size=64", 5, "model.vocab_size is 64, but the token se"),
    "B37 fewer images than a batch": (nothing, TRAIN + "--set batch_size=512", 2, "there are 48 training images; lowe"),
    "B40 LlamaGen's folders": (llamagen_codes, TRAIN.replace("{set}", "{folder}/llamagen"), 2, "has no manifest.json"),
    "B41 a tar cut between members": (archive(*IN_FOLDERS, end=3072), TAR, 4, "is cut or damaged after member ant/1"),
    "B41 a tar cut in a member": (archive(*IN_FOLDERS, end=2000), TAR, 4, "images.tar is cut"),
    "B42 a tar of halves": (archive("0.png", "1.png", "0.cls", "1.cls"), TAR, 4, "do not follow one another"),
    "B43 a member above": (archive("../0.png"), TAR, 4, "would lie outside; such an archive is not read"),
    "B44 a compressed tar": (archive(*IN_FOLDERS, mode="w:gz"), TAR, 4, "unpack it to .tar"),
}  # fmt: skip


@pytest.mark.parametrize("row", OF_COMMANDS)
def test_a_token_set_that_does_not_suit(called, token_set_path, trained_run, tmp_path, row):
    damage, words, code, says = OF_COMMANDS[row]
    shutil.copytree(token_set_path, tmp_path / "set")
    shutil.copytree(trained_run, tmp_path / "run")
    damage(tmp_path)
    called(row, words, code, says)


ENCODE = "encode --tokenizer {tokenizer} --data {folder}/images --out {out} --workers 0"
# Row -> other words of an encoding that is begun again, and what the line says.
AGAIN = {
    "B30 other views": (ENCODE + " --views ten-crop", "view_plan: center-flip -> ten-crop"),
    "B30 another size": (ENCODE + " --image-size 24", "image_size: 16 -> 24"),
    "B31 other rounding": (ENCODE + " --precision bfloat16", "precision: float32 -> bfloat16"),
    "B32 another tokenizer": (ENCODE.replace("{tokenizer}", "{set}/tokenizer"), "tokenizer_sha256: "),
}


def test_an_encoding_that_goes_on_otherwise(called, token_set_path, tmp_path):
    shutil.copytree(token_set_path, tmp_path / "set")
    other_tokenizer(tmp_path)
    for number in range(4):
        text(f"images/{'ab'[number % 2]}/{number}.png", png(number))(tmp_path)
    called("B30 the first time", ENCODE, 0, "4 images of 2 classes")
    for row, (words, says) in AGAIN.items():
        called(row, words, 5, says)


NO_TOKEN_SETS = {
    "B4": "a file has a format, one number, and no list of features that a reader must know",
    "B33": "an image is known by its place in the set, so that no number can be there twice",
    "B34": "for the same reason none can be missing; images that were left out stand in the manifest",
    "B36": "processes take whole shards when they encode, and no image is repeated to fill a batch",
    "B38": "images are numbered across shards, which are not shared out among processes",
    "B39": "the place in the data is a step, whatever the number of processes (test_resume.py)",
    "B49": "a shard is hashed when it is opened; who then writes into it while a training reads it is not stopped",
    "B50": "codes of one value are a set; training and `mutor reconstruct` say which share of codes is used",
    "B51": "latents are not stored",
}


def test_every_number_of_token_sets_is_tried_or_none_of_ours():
    assert numbers("B", [*TOKEN_SETS, *OF_COMMANDS, *AGAIN], NO_TOKEN_SETS) == []
