"""A disk of a few kilobytes: a tmpfs, in a mount namespace of the process that calls, so that nothing else sees it and
it goes with the process. Needs Linux and root."""

import ctypes
import os
import subprocess
from pathlib import Path

_CLONE_NEWNS = 0x20000


def mounted(folder: Path, kilobytes: int) -> str:
    """Mount one at `folder` -> '' or why it cannot be had."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        return os.strerror(ctypes.get_errno())
    return _mount("--make-rprivate", "/") or _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder)


def enlarged(folder: Path, kilobytes: int) -> None:
    if problem := _mount("-o", f"remount,size={kilobytes}k", folder):
        raise OSError(problem)


def _mount(*words: object) -> str:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    return done.stderr.strip() or "mount failed" if done.returncode else ""
