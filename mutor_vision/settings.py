"""Settings as frozen dataclasses: how they refuse what is wrong, and how they are read from JSON, --set and flags."""

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from mutor_vision.errors import UserError

Config = TypeVar("Config", bound="Settings")
FORMAT = 6  # of config.json; see Settings._absent_in


class Settings:
    """Base of every configuration: refuses values that are not of their field's type."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # every subclass is a dataclass
    _prefix = ""  # what --set writes before the names of these fields
    _short = ""  # the field that a plain value means where a file or --set has one in place of these settings
    # Format -> the fields that its files may lack, with what their absence meant when the weights were trained. A
    # default that changes later must not change it.
    _absent_in: ClassVar[dict[int, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]  # a class is Hashable
            self._require(name, partial(_is_of, hint=hint), _described(hint))

    @classmethod
    def _migrated(cls, given: dict[str, Any], format: int) -> dict[str, Any]:
        """Values by dotted name, of a file of `format` -> those of today's format."""
        for older in range(format, FORMAT):
            given = cls._absent_in.get(older, {}) | given
        return given

    def _require(self, names: str, holds: Callable[[Any], bool], expected: str) -> None:
        """Raise UserError for the first of the names, separated by blanks, whose value does not hold."""
        for name in names.split():
            if not holds(value := getattr(self, name)):
                raise UserError(f"{self._prefix}{name} is {shown(value)}, expected {expected}")

    def _require_one_of(self, name: str, *choices: str) -> None:
        self._require(name, choices.__contains__, f"{', '.join(choices[:-1])} or {choices[-1]}")

    def _require_positive(self, names: str) -> None:
        self._require(names, lambda value: value > 0, "more than 0")

    def _require_not_negative(self, names: str) -> None:
        self._require(names, lambda value: value >= 0, "0 or more")

    def _require_share(self, names: str) -> None:
        self._require(names, lambda value: 0 <= value < 1, "at least 0 and below 1")

    def _require_seed(self) -> None:
        self._require("seed", lambda seed: 0 <= seed < 2**63, "0 to 2^63 - 1")

    def _require_betas(self) -> None:
        self._require("betas", lambda betas: all(0 <= beta < 1 for beta in betas), "two numbers of at least 0, below 1")


def from_dict(kind: type[Config], values: Any, format: int = FORMAT) -> Config:
    """JSON object -> dataclass, strictly: unknown and missing fields are errors. format: of the file it comes from;
    what an older one did not have yet is filled in with what it meant then."""
    if not isinstance(values, dict):
        raise UserError(f"the settings are {shown(values)}, expected an object with a value for each name")
    short, hints = _shorthands(kind), _leaves(kind)
    given = {short.get(name, name): value for name, value in flat(values).items()}
    for name in given:
        if name not in hints:
            raise UserError(f"unknown setting '{name}'; {_nearest(name, list(hints))}")
    given = kind._migrated(given, format)
    if missing := [name for name in hints if name not in given]:
        raise UserError(f"setting '{missing[0]}' is missing ({len(missing)} of {len(hints)}); restore the file")
    return _build(kind, {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Dataclass -> JSON-ready dict; from_dict reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def override(config: Config, settings: list[str], **flags: Any) -> Config:
    """Apply 'name=value' strings, dotted for nested fields ('registers.count=80'), whose values are read by the field's
    type, and flags, each the value of the setting of its name, None = not given. All are applied at once, so that
    settings which belong together may come in any order; of two strings with one name the later counts.

    Raises UserError for an unknown name (naming the nearest), for a value of another type, and for a flag and a string
    that contradict each other."""
    values, hints, strings = flat(dataclasses.asdict(config)), _leaves(type(config)), {}
    short = _shorthands(type(config))
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = short.get(name, name)
        if not equals:
            raise UserError(f"setting '{setting}' has no '='; write --set name=value")
        if name not in hints:
            raise UserError(f"unknown setting '{name}'; {_nearest(name, list(hints))}")
        strings[name] = _parse(text, hints[name])
    flags = {name: value for name, value in flags.items() if value is not None}
    for name, value in flags.items():
        if strings.get(name, value) != value:
            raise UserError(f"--{name.replace('_', '-')} {value} and --set {name}={strings[name]} contradict each "
                            "other; give one of them")  # fmt: skip
    return _build(type(config), values | strings | flags)


def preset(presets: dict[str, Config], name: str) -> Config:
    """Look a preset up; the error names the nearest."""
    if name not in presets:
        raise UserError(f"unknown preset '{name}'; {_nearest(name, list(presets))}")
    return presets[name]


def differences(old: Any, new: Any) -> list[str]:
    """'name: old -> new' for every field in which two configurations of one type differ."""
    old_values, new_values = flat(to_dict(old)), flat(to_dict(new))
    return [f"{name}: {old_values[name]} -> {new_values[name]}" for name in old_values
            if old_values[name] != new_values[name]]  # fmt: skip


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one of dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _build(kind: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    """Dataclass of the values under dotted names, one for each."""
    return kind(**{
        name: _build(hint, values, f"{prefix}{name}.") if _is_nested(hint) else values[prefix + name]
        for name, hint in _hints(kind).items()  # type: ignore[arg-type]  # as above
    })  # fmt: skip


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Name -> type of each field."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _leaves(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field that holds a value, nested ones too."""
    found: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        found |= _leaves(hint, f"{prefix}{name}.") if _is_nested(hint) else {prefix + name: hint}
    return found


def _is_nested(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _shorthands(kind: type) -> dict[str, str]:
    """Name of nested settings -> dotted name of the field that a plain value in their place means."""
    return {name: f"{name}.{hint._short}" for name, hint in _hints(kind).items() if getattr(hint, "_short", "")}


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type. A truth value is no number, a whole number is a float, nan is nothing."""
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, tuple):
            return False
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(kinds) == len(value) and all(map(_is_of, value, kinds))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _described(hint: Any) -> str:
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        whole = "whole " if kinds[0] is int else ""
        return f"{whole}numbers with commas" + ("" if kinds[-1] is Ellipsis else f", {len(kinds)} of them")
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    return words.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def shown(value: Any) -> str:
    """As it stands in an error, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse(text: str, hint: Any) -> Any:
    """A --set value of the field's type, or the text itself where it is none, which the configuration then refuses."""
    try:
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        if get_origin(hint) is tuple:
            return tuple(get_args(hint)[0](part) for part in text.strip("()[]").split(",") if part.strip())
        return hint(text)
    except (ValueError, KeyError):
        return text


def _nearest(name: str, names: list[str]) -> str:
    leaves = {n.rsplit(".", 1)[-1]: n for n in names}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    close = close or [leaves[leaf] for leaf in difflib.get_close_matches(name, list(leaves), n=1, cutoff=0.5)]
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}"
