"""Files written atomically, JSON, and hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mutor_vision.errors import IntegrityError, short


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """Write a file atomically. Gives a temporary path to write to; when the block ends, the file and its name are
    flushed to the disk and it is renamed to `path`. After an error it is removed, and an older file stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    clear(partial)
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def clear(path: Path) -> None:
    """Remove what stands at a temporary name: what a killed process left, or a link that someone else has put there and
    that would lead what is written elsewhere."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


@contextmanager
def written_folder(folder: str | Path) -> Iterator[Path]:
    """The same for a folder: gives an empty one to fill, which then replaces `folder` as a whole."""
    folder = Path(folder)
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    clear(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            flush(path)
        clear(old)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    flush(folder.parent)


def flush(path: Path) -> None:
    """fsync a file, or a folder, which flushes the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    with written(path) as partial, open(partial, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def read_json(path: Path, form: Any = None) -> Any:
    """What a JSON file holds. Raises IntegrityError when it cannot be read or does not have the form.

    form: a type (int, float, str, dict, list; whole numbers are floats, too), [form] for a list of it, {str: form} for
    an object with any names, {"name": form, ...} for one with at least these names, a tuple for one of several."""
    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror}); restore it or make it anew") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise IntegrityError(f"{path} is not complete JSON ({reason}); restore it or make it anew") from None
    if form is not None:
        check_form(path, value, form)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Python would keep the last of two values of one name, and say nothing."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' stands there twice")
    return values


def check_form(path: Path, value: Any, form: Any, where: str = "") -> None:
    """Raise IntegrityError unless a value read from `path` has the form that read_json describes."""
    if isinstance(form, dict) and isinstance(value, dict):
        named = {name: form[str] for name in value} if str in form else form
        for name, inner in named.items():
            if name not in value:
                raise IntegrityError(f"{path} lacks '{where}{name}'; restore it or make it anew")
            check_form(path, value[name], inner, f"{where}{name}.")
    elif isinstance(form, list) and isinstance(value, list):
        for number, each in enumerate(value):
            check_form(path, each, form[0], f"{where}{number}.")
    elif not _is_a(value, form):
        what = f"'{where[:-1]}' is" if where else "holds"
        expected = _form_text(form)
        raise IntegrityError(f"{path}: {what} {str(value)[:60]}, expected {expected}; restore it or make it anew")


def _is_a(value: Any, form: Any) -> bool:
    if isinstance(form, tuple):
        return any(_is_a(value, each) for each in form)
    if form is None or not isinstance(form, type):
        return form is None and value is None
    if isinstance(value, bool):  # which Python counts among whole numbers
        return form is bool
    return isinstance(value, (int, float) if form is float else form)


def _form_text(form: Any) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(_form_text, form))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null",
             dict: "an object", list: "a list"}  # fmt: skip
    kind = form if isinstance(form, type) else type(form)
    return names[kind]


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A .safetensors file with a hash of its tensors, atomically (written)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written(path) as partial:
        save_file(tensors, partial, {"state_sha256": state_sha256(tensors)})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises IntegrityError when it is damaged, as far as it can tell: of one that
    write_tensors wrote, always."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("state_sha256")
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(
            f"{path} is no complete safetensors file ({short(error, 120)}); restore it or make it anew"
        ) from None
    if expected and state_sha256(tensors) != expected:
        raise IntegrityError(f"{path} is damaged: its tensors are not those that were written; make it anew")
    return tensors


def map_array(path: Path) -> np.ndarray:
    """The array of an .npy file, mapped into memory, so that a header that claims terabytes allocates nothing. Raises
    IntegrityError when it is no complete file of plain numbers."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            start = file.read(16)
        if not start.startswith(b"\x93NUMPY"):  # of which numpy would say how to load it unsafely
            raise ValueError(f"it begins with {start!r}")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy reads the header as a Python expression, which can fail in many ways
        raise IntegrityError(
            f"{path} is not a complete .npy file of numbers ({short(error, 100)}); make it again"
        ) from None
    return array


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_sha256(state: dict[str, Tensor], mark: str = ";") -> str:
    """sha256 (hex) over the names, types, shapes and bytes of all tensors, sorted by name, so that it does not depend
    on the file they are in. mark: what ends a tensor's description; hashes in token sets were made with a line end."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}{mark}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
