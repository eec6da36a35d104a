"""Files written atomically, JSON, and hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mutor_vision.errors import IntegrityError


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """Write a file atomically. Gives a temporary path to write to; when the block ends, the file and its name are
    flushed to the disk and it is renamed to `path`. After an error it is removed, and an older file stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


@contextmanager
def written_folder(folder: str | Path) -> Iterator[Path]:
    """The same for a folder: gives an empty one to fill, which then replaces `folder` as a whole."""
    folder = Path(folder)
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            flush(path)
        shutil.rmtree(old, ignore_errors=True)
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


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(f"{path} is not complete JSON ({error}); restore it or make it anew") from None


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
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
