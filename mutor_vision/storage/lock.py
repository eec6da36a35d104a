"""One job at a time writes into a run directory. The system locks RUN/.lock (flock), which says who has it, so a job
that died leaves nothing that has to be removed. Where the file system knows no locks, none is held."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from mutor_vision.errors import UserError
from mutor_vision.runtime import Runtime

_held: dict[Path, int] = {}  # by this process, until it ends


class LockedError(UserError):
    """Another job has the directory."""

    exit_code = 7


def hold(out: Path, runtime: Runtime) -> None:
    """Collective: take the lock of `out` for all processes of this job, until they end. Raises LockedError when another
    job has it, on every rank."""
    error = None
    try:
        if runtime.is_main:
            _hold(out)
    except UserError as raised:
        error = raised
    runtime.raise_together(error)


def leave_to_parent() -> None:
    """Called in a forked helper: it shares its parent's locks, and would keep them for as long as it outlives it."""
    while _held:
        os.close(_held.popitem()[1])


def _hold(out: Path) -> None:
    path = out.resolve() / ".lock"
    if path in _held:
        try:
            if os.fstat(_held[path]).st_ino == os.stat(path).st_ino:
                return  # an earlier training of this process
        except FileNotFoundError:  # its folder was removed
            pass
        os.close(_held.pop(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise UserError(f"{path} is a link, expected a file; remove it")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 1000).decode(errors="replace")
        os.close(descriptor)
        raise LockedError(f"{out} is in use by {_told(holder)}; wait for it, stop it, or give another --out") from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return
    _held[path] = descriptor
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(who).encode(), 0)


def _told(holder: str) -> str:
    try:
        who = json.loads(holder)
        return f"process {int(who['pid'])} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):  # it has just begun
        return "another process"
