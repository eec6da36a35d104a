"""Crash points: a job is killed by SIGKILL before its n-th change of a file system, and then started again.

Counted are the calls by which Python changes names and files (open for writing, rename, unlink, mkdir, ...) below a
folder, and every fsync. What a library writes by itself (safetensors) lies between two of them. A kill does not lose
what was written but not flushed, as a power failure does; the order of flushing is tested apart.
"""

import builtins
import hashlib
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import safe_open

NAMES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "symlink", "truncate")
TIMES = ("images_per_second", "images_per_s", "seconds")  # of log lines, which differ from run to run


class Counted:
    """Context that counts changes below `folder`. Before number `kill_at` (from 1, 0 = none) the process dies."""

    def __init__(self, folder: Path, kill_at: int = 0):
        self.folder, self.kill_at, self.count, self.seen = str(folder), kill_at, 0, []
        self._patches = []

    def __enter__(self) -> "Counted":
        for name in NAMES:
            self._replace(os, name, self._named(name, getattr(os, name)))
        self._replace(os, "fsync", self._always("fsync", os.fsync))
        self._replace(os, "open", self._opening(os.open))
        opened = self._file_opening(io.open)
        self._replace(io, "open", opened)
        self._replace(builtins, "open", opened)
        return self

    def __exit__(self, *_) -> None:
        for each in self._patches:
            each.stop()

    def _replace(self, module, name: str, function: Callable) -> None:
        self._patches.append(patch.object(module, name, function))
        self._patches[-1].start()

    def _step(self, what: str, path: object) -> None:
        self.count += 1
        self.seen.append(f"{what} {path}")
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _below(self, path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        # TensorBoard writes from a thread of its own, so its changes come at another number in every run.
        return os.fsdecode(path).startswith(self.folder) and "/tensorboard/" not in os.fsdecode(path)

    def _named(self, name: str, function: Callable) -> Callable:
        def call(path, *arguments, **settings):
            # shutil.rmtree names files by the descriptor of their folder.
            if self._below(path) or settings.get("dir_fd") is not None:
                self._step(name, path)
            return function(path, *arguments, **settings)

        return call

    def _always(self, name: str, function: Callable) -> Callable:
        def call(*arguments):
            self._step(name, "")
            return function(*arguments)

        return call

    def _opening(self, function: Callable) -> Callable:
        def call(path, flags, *arguments, **settings):
            if self._below(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._step("open", path)
            return function(path, flags, *arguments, **settings)

        return call

    def _file_opening(self, function: Callable) -> Callable:
        def call(path, mode="r", *arguments, **settings):
            if self._below(path) and set(mode) & set("wax+"):
                self._step("open", path)
            return function(path, mode, *arguments, **settings)

        return call


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> hash of what every file that a job leaves says. Left out: times of log lines, TensorBoard's
    files, how pickle numbers what training.pt holds, which a continued run does otherwise, and in which order, drawn at
    random, safetensors lists what torch says of an optimizer's shard."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or "tensorboard" in path.parts or path.name == ".lock":
            continue
        content = path.read_bytes()
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([{key: line[key] for key in line if key not in TIMES} for line in lines]).encode()
        elif path.name == "training.pt":
            content = _plain(torch.load(path, weights_only=True)).encode()
        elif path.parent.name == "optimizer" and path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = [(name, file.get_tensor(name)) for name in sorted(file.keys())]
                content = _plain([sorted(file.metadata().items()), tensors]).encode()
        elif path.name == "MANIFEST.json":
            manifest = json.loads(content)
            of_contents = {name for name in manifest["files"] if name == "training.pt" or name.startswith("optimizer/")}
            manifest["files"] = {name: manifest["files"][name] for name in manifest["files"] if name not in of_contents}
            manifest.pop("seal", None)  # which is over the rest
            content = json.dumps(manifest).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of the files that two trees do not have alike."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def _plain(value) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key!r}:{_plain(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_plain, value)) + "]"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()}"
    return repr(value)


def chosen(count: int, sample: int) -> list[int]:
    """Points 1 to count: all of them, or about `sample` that are spread over them."""
    return list(range(1, count + 1)) if not sample else sorted({1 + i * count // sample for i in range(sample)})
