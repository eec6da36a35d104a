"""Tar archives as sources: with class folders, one for each class, or webdataset's shards.

Members are found once by their headers and read where they lie. Nothing is ever extracted, and a member's name is a key
and no path. Compressed archives are refused: an image in them cannot be reached without unpacking all before it."""

import json
import os
import re
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mutor_vision.data.images import EXTENSIONS
from mutor_vision.data.listing import left_behind
from mutor_vision.data.packed import Packed, matching, names_of_numbers, natural_name
from mutor_vision.errors import DataError, IntegrityError, UserError, short
from mutor_vision.names import printable

LABELS = (".cls", ".json")  # members of a webdataset sample that hold its label
LARGEST_LABEL = 2**20  # bytes of such a member
_BLOCK = 512
_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)(\.[^/]*)")  # webdataset: the key ends at the first dot of the last part


class TarImages(Packed):
    """'images.tar', 'train/*.tar' or 'shards-{000..012}.tar'. Where samples have members .cls or .json, they hold the
    labels ({"label": 3}), and names come from classes.txt beside the archives. Else the first folder in the archive is
    the class, and an archive without folders is one class of its own name.

    Raises DataError and IntegrityError that name the archive and the member."""

    kind = "tar"

    @classmethod
    def claims(cls, data: str) -> bool:
        return data.endswith(".tar") and not os.path.isdir(data)

    def __init__(self, data: str | Path):
        self.files, self.name = matching(str(data)), natural_name(str(data))
        left_out: Counter[str] = Counter()
        ignored: Counter[str] = Counter()
        images, labels = [], {}  # (file, name, offset, size); (file, key) -> label
        for number, path in enumerate(self.files):
            last: dict[Any, Any] = {}  # key -> the place of its last member
            for place, (name, offset, size) in enumerate(_members(path)):
                part = PurePosixPath(name)
                key, ending = _key(part)
                if found := next(filter(None, map(left_behind, part.parts)), ""):
                    ignored[found] += 1
                    continue
                if ending in LABELS:
                    labels[number, key] = _label(path, name, offset, size, ending)
                elif part.suffix.lower() in EXTENSIONS:
                    images.append((number, name, offset, size))
                else:
                    left_out[part.suffix.lower()] += 1
                if labels and last.get(key, place - 1) != place - 1:
                    raise IntegrityError(f"{path}: the members of sample {printable(key)} do not follow one another; "
                                         "write the shard anew, sample by sample")  # fmt: skip
                last[key] = place
        self._say(left_out, ignored)
        places = np.array([(number, offset, size) for number, _, offset, size in images], dtype=np.int64)
        if labels:
            self._set(*self._labelled(images, labels, places))
        else:
            self._set(*self._in_folders(images, places))

    def content(self, file: int, place: int, size: int) -> bytes:
        return _read(self.files[file], place, size)

    def _labelled(self, images, labels, places):
        """Arguments of _set, by the labels of samples."""
        missing = [
            (number, name) for number, name, *_ in images if (number, _key(PurePosixPath(name))[0]) not in labels
        ]
        if missing:
            number, name = missing[0]
            raise IntegrityError(f"{self.files[number]}: {printable(name)} has no label (.cls or .json); "
                                 f"{len(missing)} images have none")  # fmt: skip
        of_images = [labels[number, _key(PurePosixPath(name))[0]] for number, name, *_ in images]
        if len(labels) > len(images):
            alone = labels.keys() - {(number, _key(PurePosixPath(name))[0]) for number, name, *_ in images}
            number, key = min(alone)
            raise IntegrityError(f"{self.files[number]}: sample {printable(key)} has a label and no image; write the "
                                 "shard anew")  # fmt: skip
        class_names = names_of_numbers(self.files[0].parent, of_images)
        keys = []
        for (_, name, *_), label in zip(images, of_images, strict=True):
            inside = name.startswith(f"{class_names[label]}/")
            keys.append(name if inside else f"{class_names[label]}/{name}")
        return keys, of_images, places, class_names

    def _in_folders(self, images, places):
        """Arguments of _set, by the first folder in the archive, or by archive."""
        keys = []
        for number, name, *_ in images:
            folder = self.files[number].stem + "/"
            keys.append(unicodedata.normalize("NFC", "" if "/" in name else folder) + name)
        if len(self.files) == 1 and keys and not any("/" in name for _, name, *_ in images):
            raise DataError(f"{self.files[0]} has images without class folders; expected CLASS/NAME in it, or give one "
                            "archive for each class, as 'DIR/*.tar'")  # fmt: skip
        classes = [unicodedata.normalize("NFC", key.partition("/")[0]) for key in keys]
        class_names = sorted(set(classes))
        numbers = {name: number for number, name in enumerate(class_names)}
        return keys, [numbers[name] for name in classes], places, class_names


def _key(name: PurePosixPath) -> tuple[str, str]:
    """webdataset's key of a member, and its ending in small letters."""
    found = _SAMPLE.fullmatch(str(name))
    return (found[1], found[2].lower()) if found else (str(name), "")


def _members(path: Path):
    """(name, where its bytes begin, how many) of every file in an archive."""
    before = "its beginning"
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them
                shown, parts = printable(member.name), PurePosixPath(member.name).parts
                if member.name.startswith("/") or ".." in parts or "\0" in member.name:
                    raise IntegrityError(f"{path}: member {shown} would lie outside; such an archive is not read")
                if member.size < 0:  # the next member would be this one, for ever
                    raise IntegrityError(f"{path}: member {shown} has {member.size} bytes; such an archive is not read")
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise IntegrityError(f"{path}: member {shown} is a link, a device or has holes, expected files and "
                                         "folders alone")  # fmt: skip
                if member.isreg():
                    yield str(PurePosixPath(member.name)), member.offset_data, member.size
                before = shown
            end = tar.offset
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError) as error:  # the last: headers that are no numbers
        hint = "unpack it to .tar" if _compressed(path) else "copy it again"
        raise IntegrityError(f"{path} is cut or no plain tar archive, at {before} ({short(error)}); {hint}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    # tarfile takes damage, and the end of a file that was cut between two members, for the end of the archive.
    if _read_up_to(path, end, _BLOCK) != bytes(_BLOCK):
        raise IntegrityError(f"{path} is cut or damaged after member {before}; copy it again")


def _label(path: Path, name: str, offset: int, size: int, ending: str) -> int:
    try:
        if size > LARGEST_LABEL:
            raise ValueError(f"{size:,} bytes")
        text = _read(path, offset, size).decode()
        value = json.loads(text) if ending == ".json" else int(text)
        if isinstance(value, dict):
            value = value["label"] if "label" in value else value["cls"]
        if type(value) is not int or value < 0:
            raise ValueError(f"the label {value!r}")
    except (ValueError, KeyError, RecursionError) as error:
        raise IntegrityError(f"{path}: {printable(name)} holds no label ({' '.join(str(error).split())[:80]}); "
                             'expected a class number, or JSON such as {"label": 3}') from None  # fmt: skip
    return value


def _read(path: Path, offset: int, size: int) -> bytes:
    content = _read_up_to(path, offset, size)
    if len(content) < size:
        raise IntegrityError(f"{path} has become shorter while it was read; restore it")
    return content


def _read_up_to(path: Path, offset: int, size: int) -> bytes:
    try:
        with open(path, "rb") as file:  # opened anew: processes and threads would move one another's place
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None


def _compressed(path: Path) -> bool:
    return _read_up_to(path, 0, 4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))
