"""The catalogue of bad inputs: rows of a stage and a number, A (images), B (token sets), C (checkpoints), D (settings),
E (command line and environment), F (inputs of the evaluation). A row says how the input is made, what is called, the
exit code, and words of the line. A number may have several rows; a number that has none is in its file's NOT_OURS, with
the reason."""

import io
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from faults.score import record
from mutor_vision.storage.seal import write_manifest

LAST = {"A": 55, "B": 51, "C": 52, "D": 51, "E": 52, "F": 52}  # stage -> its last number
_NOT_SHOWN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # by Python, to a user
_ORDERS = r"[\x00-\x08\x0b-\x1f\x7f]"  # what a terminal does not print


def numbers(stage: str, tried: Iterable[str], not_ours: Iterable[str]) -> list[str]:
    """The numbers of a stage that are missing, or that are said to be none of ours and are tried all the same."""
    tried = {name.split()[0] for name in tried if re.match(rf"{stage}\d+ ", name)}
    every, not_ours = {f"{stage}{number}" for number in range(1, LAST[stage] + 1)}, set(not_ours)
    return sorted((every ^ (tried | not_ours)) | (tried & not_ours))


def words_of(text: str, **places: object) -> list[str]:
    """The words of a command. {name} stands for a path, which may hold blanks."""
    return [word.format(**places) for word in text.split()]


def tried(promise: str, row: str, command, words: Iterable[object], code: int, says: str):
    """Call a command and record whether it ends as its row says: its exit code, its words, one line for a mistake, no
    traceback, no warning of a library, nothing that a terminal would obey. -> what the command left."""
    with warnings.catch_warnings(record=True) as warned:
        done = command(*words)
    warned = [str(each.message) for each in warned if not issubclass(each.category, _NOT_SHOWN)]
    said = done.out + done.err
    held = (
        done.code == code and says in said and "Traceback" not in said and done.err.count("\n") <= 1
        and (code == 0 or done.err.startswith("error: ")) and not re.search(_ORDERS, said) and not warned
    )  # fmt: skip
    record(promise, row, int(held), 1)
    assert held, f"exit code {done.code}: {said}{warned}"
    return done


def nothing(folder: Path) -> None:
    """Of a row whose words alone are bad."""


def text(name: str, content: str | bytes):
    def write(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def without(name: str):
    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut(name: str, size: int = -50):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def flip(name: str, place: int = -3):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 4
        (folder / name).write_bytes(content)

    return damage


def swap(one: str, other: str):
    def damage(folder):
        (folder / one).rename(folder / "x")
        (folder / other).rename(folder / one)
        (folder / "x").rename(folder / other)

    return damage


def png(seed: int) -> bytes:
    """16 pixels square, of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(16, 16, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def resealed(folder: Path) -> None:
    """The MANIFEST.json that a folder would have if its files had been written so."""
    step = json.loads((folder / "MANIFEST.json").read_text()).get("step")
    write_manifest(folder, **({} if step is None else {"step": step}))


def weights(change: Callable, name: str = "model.safetensors"):
    """Other weights of a checkpoint or exported model, in a folder that is whole."""

    def damage(folder):
        save_file(change(load_file(folder / name)), folder / name)
        resealed(folder)

    return damage
