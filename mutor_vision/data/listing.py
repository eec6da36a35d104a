"""Which files below a folder are images. Every command that reads folders lists them here.

Links to files and folders are followed. Files that operating systems, archives and storage devices leave behind are
ignored, by the list below. Other files without an image's ending are left out, counted, and reported in one line.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutor_vision.data.images import EXTENSIONS
from mutor_vision.errors import DataError
from mutor_vision.names import printable

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")

# These names in any letter case, and every name that begins with a dot (.DS_Store, ._x, .Trash-1000, .git, .snapshot).
LEFT_BEHIND = re.compile(
    r"""
    __MACOSX | Icon\r | Network\ Trash\ Folder | Temporary\ Items | TheVolumeSettingsFolder     # macOS, its archives
    | Thumbs\.db | ehthumbs(_vista)?\.db | desktop\.ini | \$RECYCLE\.BIN                         # Windows
    | System\ Volume\ Information | FOUND\.\d{3} | .*:Zone\.Identifier
    | lost\+found | LOST\.DIR | aquota\.(user|group)                                             # Linux, Android
    | @eaDir | \#recycle | \#snapshot | @tmp | @Recycle | @Recently-Snapshot | ~snapshot         # storage devices
    | PaxHeaders?(\.\w+)? | __pycache__                                                          # old tar, Python
    """,
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Listing:
    """The images below a folder."""

    paths: list[str]  # relative, with '/'; sorted by folder, then by name, as torchvision lists them
    left_out: dict[str, int]  # ending ('' = none) -> number of files that are no images by it
    ignored: dict[str, int]  # name that a system leaves behind ('.*' = any with a dot first) -> how often


def list_images(root: str | Path) -> Listing:
    """Every image below `root`, without opening a file. Raises DataError for a folder that may not be read, a broken
    link, a link to a folder that contains it, and a pipe, socket or device with an image's ending."""
    root = Path(root)
    _check_root(root)
    paths: list[str] = []
    left_out: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    # (folder, its path relative to root with a '/' at its end, real paths of the folders that contain it)
    waiting: list[tuple[str, str, tuple]] = [(os.fspath(root), "", ())]
    while waiting:
        folder, relative, above = waiting.pop()
        here = os.path.realpath(folder)
        if here in above:
            raise DataError(f"{printable(folder)} is a link to a folder that contains it; remove it")
        for entry in _entries(folder):
            ending = os.path.splitext(entry.name)[1].lower()
            if found := left_behind(entry.name):
                ignored[found] += 1
            elif _is_folder(entry):
                waiting.append((entry.path, f"{relative}{entry.name}/", (*above, here)))
            elif ending not in EXTENSIONS:
                left_out[ending] += 1
            elif not entry.is_file():
                raise DataError(f"{printable(entry.path)} is not a regular file; remove it")
            else:
                paths.append(relative + entry.name)
    return Listing(sorted(paths, key=os.path.split), most_first(left_out), most_first(ignored))


def list_folders(root: str | Path) -> list[str]:
    """Names of the folders directly in `root`, sorted, without those that systems leave behind."""
    root = Path(root)
    _check_root(root)
    entries = [entry for entry in _entries(os.fspath(root)) if not left_behind(entry.name)]
    return sorted(entry.name for entry in entries if _is_folder(entry))


def say_left_out(root: str | Path, listing: Listing) -> None:
    """Print on rank 0 one line that says which files of a folder are not used as images, if there are any."""
    if os.environ.get("RANK", "0") != "0" or not (listing.left_out or listing.ignored):
        return
    parts = []
    if listing.left_out:
        kinds = (f"{count:,} {printable(ending) or 'without ending'}" for ending, count in listing.left_out.items())
        parts.append(
            f"{sum(listing.left_out.values()):,} file(s) left out by their ending or place ({', '.join(kinds)})"
        )
    if listing.ignored:
        parts.append(f"ignored, as systems leave it behind: {', '.join(map(printable, listing.ignored))}")
    print(f"{printable(str(root))}: {'; '.join(parts)}", flush=True)


def left_behind(name: str) -> str:
    """The name under which a file that a system left behind is counted; '' for any other file."""
    if name.startswith("."):
        return ".*"
    return name if LEFT_BEHIND.fullmatch(name) else ""


def most_first(counts: Counter) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _check_root(root: Path) -> None:
    if root.is_dir():
        return
    if root.is_file():
        archive = root.suffix.lower() in ARCHIVES
        raise DataError(f"{root} is {'an archive: extract it first' if archive else 'a file, expected a folder'}")
    parent = next(p for p in root.absolute().parents if p.is_dir())
    raise DataError(f"{root} does not exist; the nearest folder that does is {parent}")


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"{printable(folder)} cannot be listed ({error.strerror}); mend its rights, or remove it"
        ) from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        if not entry.is_dir() and entry.is_symlink():
            os.stat(entry.path)  # raises for a broken link, which may have been a folder of images
        return entry.is_dir()
    except OSError as error:
        kind = "a broken link" if entry.is_symlink() else "unreadable"
        raise DataError(
            f"{printable(entry.path)} is {kind} ({error.strerror}); restore what it names, or remove it"
        ) from None
