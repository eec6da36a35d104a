"""Names of classes, files and folders: how they are read from a list, compared, chosen and printed.

Two names are the same when they agree after Unicode's composition (NFC: macOS stores 'é' as two characters, others as
one) and after blanks at the ends are taken off and runs of blanks made one.
"""

import codecs
import difflib
import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from mutor_vision.errors import UserError

_BOMS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_ID = re.compile(r"[+-]?[0-9]{1,18}")
_WNID = re.compile(r"n[0-9]{8}")
Name = str | tuple[str, ...]  # of a class: one, or several that it is known by
# Left-to-right and right-to-left marks and overrides: in a line they would reorder what stands around the name.
_DIRECTION_MARKS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def same(name: str) -> str:
    """The form in which names are compared."""
    return " ".join(unicodedata.normalize("NFC", name).split())


def printable(name: str, limit: int = 0) -> str:
    """A name as it can be shown in one line of a terminal or a picture: control characters, line ends, marks of
    direction and bytes that are no text (which Python keeps as lone surrogates) become escapes; more than `limit`
    characters (0 = any number) are cut."""
    text = "".join(_escaped(character) for character in name)
    return text if not limit or len(text) <= limit else text[: limit - 3] + "..."


def in_words(name: str) -> str:
    """A class that has ImageNet's id for a name, such as n01443537, in WordNet's words: 'goldfish, Carassius auratus'.
    Any other name, and an id that is none of ImageNet's 21,841, as it is."""
    return _imagenet().get(name, name) if _WNID.fullmatch(name) else name


def known_as(class_names: Sequence[str]) -> list[Name]:
    """Classes to choose from: those of ImageNet's ids by their words, too."""
    return [name if in_words(name) == name else (name, in_words(name)) for name in class_names]


def title(name: str) -> str:
    """A class as a picture names it: the first of in_words for ImageNet's ids ('goldfish'), any other name whole."""
    words = in_words(name)
    return words if words == name else words.partition(",")[0]


@functools.cache
def _imagenet() -> dict[str, str]:
    from timm.data import ImageNetInfo  # here: it takes a second

    info = ImageNetInfo("imagenet22k")
    return {label: info.label_name_to_description(label) for label in info.label_names()}


def _escaped(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTION_MARKS:
        return character.encode("unicode_escape").decode("ascii")
    return character


def read_names(path: str | Path) -> list[str]:
    """A text file with a class name a line -> the names, in the order of the ids. UTF-8, or UTF-16 and UTF-32 with
    their mark, also where files with marks were joined; line ends of any kind; blanks at the ends and empty lines are
    dropped. Raises UserError for other files, such as JSON or without a name, and for a name that occurs twice."""
    try:
        content = Path(path).read_bytes()
        encoding = next((name for mark, name in _BOMS if content.startswith(mark)), "utf-8")
        text = content.decode(encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as class names ({error}); expected a text file in UTF-8, a name a line"
        ) from None
    if "\0" in text:
        raise UserError(f"{path} holds zero bytes and is no text in UTF-8; save it as UTF-8, a name a line")
    text = text.replace("\ufeff", "")
    if (text.strip()[:1], text.strip()[-1:]) in (("[", "]"), ("{", "}")):
        raise UserError(f"{path} looks like JSON; expected a text file with a name a line, in the order of the ids")
    lines = {number: line.strip() for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1)}
    lines = {number: name for number, name in lines.items() if name}
    if not lines:
        raise UserError(f"{path} holds no name; expected a class name a line")
    first: dict[str, int] = {}
    for number, name in lines.items():
        if (before := first.setdefault(same(name), number)) != number:
            raise UserError(
                f"{path} names a class twice: '{printable(name)}' in lines {before} and {number}; tell them apart"
            )
    return list(lines.values())


def parse_classes(text: str, class_names: Sequence[Name]) -> list[int]:
    """'207,360', 'tench, Tinca tinca', or 'goldfish,tabby' -> class ids.

    A whole number is always an id, also where a class has that name. Else names that hold commas themselves are
    found first, the longest that fits; what is left between commas is matched as `match_class` does. Raises
    UserError."""
    if (whole := _find(text, class_names, _FULL)) and not _ID.fullmatch(text.strip()):
        return [_only(text, whole, class_names)]
    parts, classes = text.split(","), []
    while parts:
        for count in range(len(parts), 0, -1):
            candidate = ",".join(parts[:count])
            if count == 1:
                classes.append(_class_of(candidate.strip(), class_names))
            elif found := _find(candidate, class_names, _FULL):
                classes.append(_only(candidate, found, class_names))
            else:
                continue
            parts = parts[count:]
            break
    return classes


def match_class(name: str, class_names: Sequence[Name]) -> int:
    """The id of the class of this name: as it is written, else in another Unicode form or with other blanks, else in
    other letter case, else one of the synonyms that a name lists with commas ('tench' of 'tench, Tinca tinca'), in
    this order. A number that names no class is an id. Raises UserError when no class or several have the name."""
    found = _find(name, class_names, (*_FULL, *_SYNONYM))
    return _only(name, found, class_names) if found else _class_of(name.strip(), class_names)


def _class_of(text: str, class_names: Sequence[Name]) -> int:
    if _ID.fullmatch(text):
        if not 0 <= int(text) < len(class_names):
            raise UserError(f"class {int(text)} does not exist; this model has classes 0 to {len(class_names) - 1}")
        return int(text)
    if found := _find(text, class_names, (*_FULL, *_SYNONYM)):
        return _only(text, found, class_names)
    names = [own for name in class_names for own in _all(name)]
    known = {same(part): printable(part.strip()) for name in names for part in (name, *name.split(","))}
    close = difflib.get_close_matches(same(text), known, n=1, cutoff=0.4)
    hint = f"did you mean '{known[close[0]]}'?" if close else f"give ids 0 to {len(class_names) - 1}, or names"
    raise UserError(f"class '{printable(text)}' does not exist; {hint}")


def _all(name: Name) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def _folded(name: str) -> str:
    return same(same(name).casefold())


# Ways to compare, the strictest first: (form of a name, whether each part of a class's name counts).
_Way = tuple[Callable[[str], str], bool]
_FULL: tuple[_Way, ...] = ((str, False), (same, False), (_folded, False))
_SYNONYM: tuple[_Way, ...] = ((same, True), (_folded, True))


def _find(text: str, class_names: Sequence[Name], ways: tuple[_Way, ...]) -> list[int]:
    """Ids of the classes that have this name in the strictest way in which any has it; [] for no class."""
    for form, parts in ways:
        if not (wanted := form(text)):
            continue
        found = [
            number
            for number, name in enumerate(class_names)
            if wanted in {form(part) for own in _all(name) for part in (own.split(",") if parts else [own])}
        ]
        if found:
            return found
    return []


def _only(text: str, found: list[int], class_names: Sequence[Name]) -> int:
    if len(found) > 1:
        shown = ", ".join(f"{number} ('{printable(_all(class_names[number])[-1])}')" for number in found[:4])
        raise UserError(f"'{printable(text.strip())}' names {len(found)} classes: {shown}; give one of these ids")
    return found[0]
