"""Checks, before the work begins, that its results can be written."""

import errno
import os
import re
import stat
import tempfile
from pathlib import Path

from mutor_vision.errors import UserError


def check_out_file(path: str | Path) -> None:
    """Raise UserError unless a file can be written at `path`. Nothing is left behind."""
    path = _local(path)
    if _is_folder(path):
        raise UserError(f"{path} is a folder, expected the name of a file; give another")
    _try_to_write(path, path.absolute().parent)


def check_new(path: str | Path) -> None:
    """Raise UserError when there is something at `path`, a broken link too, or when nothing can be written there."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; remove it or give another name")
    check_out_file(path)


def check_out_folder(path: str | Path) -> None:
    """Raise UserError unless files can be written in a folder at `path`, which may not exist yet. Nothing is left
    behind."""
    path = _local(path)
    if not _is_folder(path) and os.path.lexists(path):
        raise UserError(f"{path} is a file, expected a folder; give another")
    _try_to_write(path, path.absolute())


def _local(path: str | Path) -> Path:
    # 's3://bucket/x' would become a folder 's3:' here, and the results would be looked for elsewhere.
    if found := re.match(r"pipe:|[A-Za-z][\w+.-]+:/", str(path)):
        raise UserError(f"{path} begins with '{found[0]}', expected a path on this machine's disks; copy results later")
    path = Path(path)
    if ".." in path.parts and not os.path.lexists(path):  # which mkdir makes on its way up: 'run/new/..' is 'run'
        raise UserError(f"{path} goes up from a folder that does not exist; write it without '..'")
    return path


def existing(path: Path) -> Path:
    """The nearest of an absolute path and its parents that exists."""
    return path if path.exists() else existing(path.parent)


def _is_folder(path: Path) -> bool:
    try:  # not Path.is_dir, which since Python 3.14 returns False for every error
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        # A name that is too long, a folder without rights.
        raise UserError(f"{path} cannot be written ({error.strerror}); give another place") from None


def _try_to_write(path: Path, folder: Path) -> None:
    # Permissions do not show a read-only or full disk, so a temporary file is written where the first file would be.
    try:
        folder = existing(folder)
        with tempfile.TemporaryFile(dir=folder, prefix=".mutor-") as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}: {folder}); give another place") from None
