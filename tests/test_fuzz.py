"""Files with single bytes changed, by a fixed seed: a reader gives the same, or what it could check, or refuses in
one line; never another error, never 1 GB of memory. `make test-slow` tries forty times as many."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from faults.memory import little_memory
from faults.score import everything, record
from safetensors.torch import save_file

from mutor_vision.config import TrainConfig
from mutor_vision.data.token_set import TokenSet, load_array
from mutor_vision.errors import UserError
from mutor_vision.features.sources import read_labels
from mutor_vision.storage import checkpoint, foreign
from mutor_vision.storage.files import read_tensors, state_sha256, write_tensors
from mutor_vision.storage.npz import Npz, check_image_array
from mutor_vision.storage.npz_writer import NpzImageWriter
from mutor_vision.storage.run_log import read_log

CHANGES = 20_000 if everything() else 500
LARGEST = 2**30  # bytes that a reader may allocate for these small files
LONGEST = 5  # seconds for a small file: there is none that takes a hundredth of it


def changed(content: bytes, generator: np.random.Generator) -> bytes:
    place, kind = int(generator.integers(len(content))), generator.integers(4)
    if kind == 0:
        return content[:place] + bytes([content[place] ^ (1 << int(generator.integers(8)))]) + content[place + 1 :]
    if kind == 1:
        return content[:place] + bytes([int(generator.integers(256))]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + content[place + 1 :]
    return content[:place] + bytes([int(generator.choice([0, 34, 44, 45, 57, 91, 123, 255]))]) + content[place:]


def tensors():
    return {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor([3])}


def made_checkpoint(folder):
    return checkpoint.save(folder, 3, "transformer", TrainConfig(), {"model": tensors()}, {"step": 3}, keep=2)


def checkpoint_file(name):
    def make(folder, token_set):
        return made_checkpoint(folder) / name

    def read(path):
        checkpoint.verify(path.parent)
        config = checkpoint.read_config(path.parent, "transformer", TrainConfig)
        weights = state_sha256(checkpoint.read_weights(path.parent, "model"))
        return config, weights, checkpoint.read_training_state(path.parent)

    return make, read


def alone(name, read):
    """A file of a checkpoint without its MANIFEST.json, as of an export by hand: what is wrong may not be seen."""

    def make(folder, token_set):
        path = made_checkpoint(folder) / name
        (path.parent / "MANIFEST.json").unlink()
        return path

    return make, read


def token_set_file(folder, token_set):
    return shutil.copytree(token_set, folder / "set") / "manifest.json"


def read_token_set(path):
    tokens = TokenSet.open(path.parent)
    return tokens.manifest, tokens.codes().tolist(), tokens.labels.tolist()


def image_npz(folder, token_set):
    with NpzImageWriter(folder / "x.npz", 2, 4, 4, {"arr_1": np.arange(2)}) as writer:
        writer.write(torch.arange(96).to(torch.uint8).view(2, 3, 4, 4))
    return folder / "x.npz"


def read_image_npz(path):
    npz = Npz(path)
    check_image_array(npz)
    npz.check_crc()
    return npz.read("arr_0").tolist()


def array(folder, token_set):
    np.save(folder / "x.npy", np.arange(12, dtype=np.int64))
    return folder / "x.npy"


def pickled(folder, token_set):
    torch.save({"model": tensors()}, folder / "x.pt")
    return folder / "x.pt"


def sealed_tensors(folder, token_set):
    write_tensors(folder / "x.safetensors", tensors())
    return folder / "x.safetensors"


def plain_tensors(folder, token_set):
    save_file(tensors(), folder / "x.safetensors")
    return folder / "x.safetensors"


def log(folder, token_set):
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, 9)))
    return folder / "log.jsonl"


def read_foreign(path):
    found = foreign.read(path)
    return state_sha256({name: found.load(name) for name in found.tensors}, "\n")


# Name -> (makes the file, reads it, whether every change of what is read is seen).
READERS = {
    "MANIFEST.json of a checkpoint": (*checkpoint_file("MANIFEST.json"), True),
    "config.json of a checkpoint": (*checkpoint_file("config.json"), True),
    "training.pt of a checkpoint": (*checkpoint_file("training.pt"), True),
    "weights of a checkpoint": (*checkpoint_file("model.safetensors"), True),
    "config.json alone": (*alone("config.json", lambda path: checkpoint.read_config(
        path.parent, "transformer", TrainConfig)), False),
    "training.pt alone": (*alone("training.pt", lambda path: checkpoint.read_training_state(path.parent)), False),
    "manifest.json of a token set": (token_set_file, read_token_set, True),
    "npz of images": (image_npz, read_image_npz, True),
    "npy of codes": (array, lambda path: load_array(path, np.int64, (12,)).tolist(), False),
    "npy of labels": (array, lambda path: read_labels(path, 12).tolist(), False),
    "a stranger's .pt": (pickled, read_foreign, True),
    "our safetensors": (sealed_tensors, lambda path: state_sha256(read_tensors(path)), True),
    "a stranger's safetensors": (plain_tensors, read_foreign, False),
    "log.jsonl": (log, lambda path: read_log(path.parent), False),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_a_changed_byte_is_seen_or_harmless(name, tmp_path, token_set_path):
    make, read, sees_all = READERS[name]
    path, generator = make(tmp_path, token_set_path), np.random.default_rng(0)
    content, expected, wrong = path.read_bytes(), read(path), []
    refused, longest = 0, 0.0
    with little_memory(LARGEST):
        for number in range(CHANGES):
            path.write_bytes(now := changed(content, generator))
            began = time.process_time()
            try:
                if (got := read(path)) != expected and sees_all:
                    wrong.append((number, now, f"read as {str(got)[:80]}"))
            except UserError as error:
                refused += 1
                if "\n" in str(error) or len(str(error)) > 600:
                    wrong.append((number, now, f"no line: {error}"))
            except Exception as error:
                wrong.append((number, now, f"{type(error).__name__}: {error}"))
            longest = max(longest, time.process_time() - began)
    record("Bytes changed at random", name, CHANGES - len(wrong), CHANGES)
    assert not wrong, f"{len(wrong)} of {CHANGES}: {[(number, text[:160]) for number, _, text in wrong[:6]]}"
    assert (refused or name == "log.jsonl") and longest < LONGEST
