"""Seals: what was written is what is read, to the byte. A sealed JSON file holds the hash of its own content; a
MANIFEST.json is a sealed file with the hash of every other file of its folder. Files that were written before there
were seals have a lower format, and are read as before."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mutor_vision.errors import IntegrityError, MismatchError
from mutor_vision.storage.files import check_form, read_json, sha256, write_json

SEALED = 2  # the format from which a file has a seal; of format 1 are those without
MANIFEST = "MANIFEST.json"
_FILES = {"files": {str: {"bytes": int, "sha256": str}}}


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write JSON with its own hash. values: without a format, which says that there is a seal."""
    values = {**values, "format": SEALED}
    write_json(path, {**values, "seal": _seal(values)})


def read_sealed(path: Path, form: Any = None) -> dict[str, Any]:
    """What write_sealed or, without a seal, an older version wrote. Raises IntegrityError when it was changed,
    MismatchError when its format is a later one."""
    values = read_json(path, {"format": int})
    seal = values.pop("seal", None)
    if seal != (_seal(values) if seal is not None or values["format"] == SEALED else None):
        raise IntegrityError(f"{path} was changed after it was written: its seal does not fit; restore it")
    if values["format"] not in (1, SEALED):
        raise MismatchError(f"{path} has format {values['format']}, this version reads up to {SEALED}; make it anew, "
                            "or upgrade mutor_vision")  # fmt: skip
    if form is not None:
        check_form(path, values, form)
    return values


def write_manifest(folder: Path, **values: Any) -> None:
    """Seal a folder: MANIFEST.json with the hash of every file in it, and `values`."""
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in _files_of(folder).items()}
    write_sealed(folder / MANIFEST, {**values, "files": files})


def check_manifest(folder: Path) -> dict[str, Any]:
    """What MANIFEST.json says. Raises IntegrityError, naming the file, unless the folder holds the files that it lists
    and no other, to the byte."""
    manifest = read_sealed(folder / MANIFEST, _FILES)
    there = _files_of(folder)
    if further := sorted(there.keys() - manifest["files"].keys()):
        raise IntegrityError(f"{folder / further[0]} is not listed in {MANIFEST}; remove it")
    for name, expected in manifest["files"].items():
        if name not in there:  # also a name that leads out of the folder
            raise IntegrityError(f"{folder / name} is missing; use another copy, or an older checkpoint")
        path = there[name]
        if path.stat().st_size != expected["bytes"]:
            raise IntegrityError(f"{path} has {path.stat().st_size} bytes, expected {expected['bytes']}")
        try:
            got = sha256(path)
        except OSError as error:
            raise IntegrityError(f"{path} cannot be read ({error.strerror}); use another copy") from None
        if got != expected["sha256"]:
            raise IntegrityError(f"{path} is damaged: sha256 {got[:12]}, expected {expected['sha256'][:12]}")
    return manifest


def _files_of(folder: Path) -> dict[str, Path]:
    """Every file below a folder but its manifest and hidden ones, by its name in it."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name != MANIFEST and not path.name.startswith(".")}


def _seal(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
