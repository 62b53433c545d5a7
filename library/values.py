"""Turns what TOML or the command line gave into the type an option declares."""

from __future__ import annotations

import math
import types
import typing
from pathlib import Path
from typing import Any

from library.errors import did_you_mean
from library.options import Option, Secret


def convert(option: Option, raw: Any) -> Any:
    """The option's value for a raw one; ValueError says what was expected.

    An empty text or list leaves an option that may be unset unset, as config files written by GUIs mean it; so does 0
    where the option says so.
    """
    if types.NoneType in _kinds(option.type) and (raw in ("", []) or (option.zero_is_unset and _number(raw) == 0)):
        return None
    if option.parse:
        value = option.parse(_single(raw))
    elif _holds_paths(option):
        value = tuple(map(_to_path, _to_texts(raw)))
    else:
        value = _CONVERTERS[kinds(option)](raw)
    if option.choices is not None and value not in option.choices:
        known = ", ".join(map(str, option.choices))
        raise ValueError(f"expected one of {known}{did_you_mean(str(value), map(str, option.choices))}")
    return value


def kinds(option: Option) -> tuple[type, ...]:
    """The types a value may have, apart from None; a list of anything is a tuple."""
    return tuple(kind for kind in _kinds(option.type) if kind is not types.NoneType)


def is_bool(option: Option) -> bool:
    """Whether the option is a switch: on, off, or unset."""
    return bool in kinds(option)


def is_path(option: Option) -> bool:
    """Whether the value names a file or folder, or several."""
    return Path in kinds(option) or _holds_paths(option)


def is_secret(option: Option) -> bool:
    """Whether the value must not be shown."""
    return Secret in kinds(option)


def takes_several(option: Option) -> bool:
    """Whether the option may be given several words on the command line."""
    return tuple in kinds(option)


def says_nothing(option: Option, raw: Any) -> bool:
    """Whether a value is only what GUIs write for a field that was left empty, in an option that has a value always."""
    if types.NoneType in _kinds(option.type):
        return False
    if option.zero_is_unset and _number(raw) == 0:
        return True
    takes_text = kinds(option) == (str,) and option.choices is None and option.parse is None
    return isinstance(raw, str) and raw == "" and not takes_text and not takes_several(option)


def _holds_paths(option: Option) -> bool:
    return option.type == tuple[Path, ...]


def _kinds(annotation: Any) -> tuple[type, ...]:
    """int | None -> (int, NoneType); tuple[str, ...] -> (tuple,)."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return tuple(kind for member in typing.get_args(annotation) for kind in _kinds(member))
    return (typing.get_origin(annotation) or annotation,)


def _single(raw: Any) -> Any:
    """The command line gives one word as a list of one; Kohya's files give the text encoder's rate so."""
    return raw[0] if isinstance(raw, list) and len(raw) == 1 else raw


def _to_bool(raw: Any) -> bool:
    """0 and 1 are what some GUIs write."""
    if raw in (0, 1):
        return bool(raw)
    if isinstance(raw, str) and raw.lower() in ("true", "false"):
        return raw.lower() == "true"
    raise ValueError("expected true or false")


def _to_int(raw: Any) -> int:
    number = _number(raw)
    if number is None or number != int(number):
        raise ValueError("expected a whole number")
    return int(number)


def _to_float(raw: Any) -> float:
    number = _number(raw)
    if number is None:
        raise ValueError("expected a number")
    return float(number)


def _to_int_or_float(raw: Any) -> int | float:
    """Whole numbers stay whole: they count steps, where others are a fraction."""
    number = _to_float(raw)
    return int(number) if number.is_integer() else number


def _number(raw: Any) -> int | float | None:
    """A finite number from a number or its text ("1e-4"); None for anything else, booleans included."""
    raw = _single(raw)
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        return None
    try:
        if isinstance(raw, str):
            raw = int(raw) if raw.strip().lstrip("+-").isdecimal() else float(raw)
        return raw if math.isfinite(raw) else None
    except (ValueError, OverflowError):
        return None


def _to_text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError("expected a text in quotes")
    return raw


def _to_path(raw: Any) -> Path:
    if not isinstance(raw, str) or not raw:
        raise ValueError("expected a path in quotes")
    if any(character < " " for character in raw):  # TOML reads "C:\train" as "C:", a tab and "rain"
        raise ValueError("expected a path; in paths write / instead of \\, or use single quotes")
    return Path(raw)


def _to_secret(raw: Any) -> Secret:
    return Secret(_to_text(raw))


def _to_texts(raw: Any) -> tuple[str, ...]:
    """A single text is a list of one; an empty one is an empty list."""
    texts = ([raw] if raw else []) if isinstance(raw, str) else raw
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError('expected a list of texts, such as ["key=value"]')
    return tuple(texts)


_CONVERTERS = {
    (bool,): _to_bool,
    (int,): _to_int,
    (float,): _to_float,
    (int, float): _to_int_or_float,
    (str,): _to_text,
    (Path,): _to_path,
    (Secret,): _to_secret,
    (tuple,): _to_texts,
}
