"""Damage to files, one at a time: a flipped bit, a byte set to zero, a cut, zeros at the end, junk behind it, an empty
file, none, another's file. What is read afterwards must be the same, or refused in one line."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mutor_vision.errors import UserError

LONGEST_LINE = 600  # characters of a message


@dataclass(frozen=True)
class Damage:
    """What was done to a file: a title, and its new content; None = the file is gone."""

    what: str
    content: bytes | None


def damages(content: bytes, other: bytes | None, flips: int, seed: int) -> Iterator[Damage]:
    """other: the file of the same name of another run, model or set."""
    generator = np.random.default_rng(seed)
    size = len(content)
    places = {0, size - 1, *generator.integers(size, size=flips).tolist()} if size else ()
    for place in sorted(places):
        bit = 1 << int(generator.integers(8))
        yield Damage(f"bit of byte {place}", content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
    for place in generator.integers(size, size=flips // 4).tolist() if size else ():
        yield Damage(f"byte {place} zero", content[:place] + b"\0" + content[place + 1 :])
    for end in sorted({size // 2, size - 1, *generator.integers(size, size=flips // 4).tolist()}) if size else ():
        yield Damage(f"cut at {end}", content[:end])
    yield Damage("zeros at the end", content[: size // 2] + bytes(size - size // 2))
    yield Damage("junk behind it", content + b"\0junk")
    yield Damage("empty", b"")
    yield Damage("gone", None)
    if other is not None and other != content:
        yield Damage("another's", other)


@dataclass
class Tally:
    """How many damages were refused in a line or harmless, and what became of the others."""

    tried: int = 0
    refused: int = 0
    harmless: int = 0
    wrong: list[str] | None = None

    @property
    def held(self) -> int:
        return self.refused + self.harmless


def damage_all(whole: Path, other: Path, read: Callable[[Path], object], *, flips: int, skip: set[str] = frozenset()):
    """Damage every file of the folder `whole` in every way and read it. read: the folder -> what a user gets from it.
    other: a folder of the same kind. skip: names of files that are not read. Returns a Tally."""
    expected, tally = read(whole), Tally(wrong=[])
    for number, path in enumerate(sorted(p for p in whole.rglob("*") if p.is_file() and p.name not in skip)):
        name, content = path.relative_to(whole), path.read_bytes()
        others = other / name
        for damage in damages(content, others.read_bytes() if others.is_file() else None, flips, number):
            path.unlink(missing_ok=True)  # not written over: it may be a link to a file that others have
            if damage.content is not None:
                path.write_bytes(damage.content)
            tally.tried += 1
            if problem := _outcome(whole, read, expected, tally):
                tally.wrong.append(f"{name}, {damage.what}: {problem}")
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    assert read(whole) == expected
    return tally


def _outcome(folder: Path, read: Callable[[Path], object], expected: object, tally: Tally) -> str:
    try:
        got = read(folder)
    except UserError as error:
        text = str(error)
        if "\n" in text.strip() or len(text) > LONGEST_LINE:
            return f"no line of a user's: {text[:200]}"
        tally.refused += 1
        return ""
    except Exception as error:
        return f"a traceback: {type(error).__name__}: {str(error)[:100]}"
    if got != expected:
        return "read as something else, without a word"
    tally.harmless += 1
    return ""


def copied(source: Path, target: Path) -> Path:
    """A copy without links, so that damage stays in it."""
    return Path(shutil.copytree(source, target))
