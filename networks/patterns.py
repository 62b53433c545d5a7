"""Patterns that choose modules by their dotted paths."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from library.errors import SettingError

Value = TypeVar("Value")

# What a suffix or glob never holds, or how no path begins: Kohya's users write regular expressions without a mark.
_REGEX_MARKS = re.compile(r"[\\(|+^$]|^\.\*")
_RANGE = re.compile(r"(?<![^.])(\d+)-(\d+)(?![^.])")


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern means the module of this path.

    - a suffix of whole parts: "self_attn.q_proj", "mlp.layer1"
    - a glob over the whole path: "blocks.1?.mlp.*"
    - a range of block numbers in either: "blocks.4-11.mlp.layer1", "blocks.20-27.*"
    - a regular expression over the whole path: after "re:", or where it shows ("\\", "(", "|", "+", "^", "$", or ".*"
      at its start)

    Raises SettingError for a regular expression that is none.
    """
    try:
        return _compiled(pattern).fullmatch(path) is not None
    except re.error as error:
        raise SettingError(f"{pattern!r} is not a regular expression: {error}") from error


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        return re.compile(pattern[3:])
    if _REGEX_MARKS.search(pattern):
        return re.compile(pattern)
    parts = _RANGE.split(pattern)  # text, first, last, text, …
    texts = [_glob(text) for text in parts[::3]]
    ranges = [_any_of(int(first), int(last)) for first, last in zip(parts[1::3], parts[2::3], strict=True)]
    expression = "".join(text + number for text, number in zip(texts, [*ranges, ""], strict=True))
    is_glob = any(character in pattern for character in "*?[")
    return re.compile(expression if is_glob else rf"(?:.*\.)?{expression}", re.DOTALL)


def _glob(text: str) -> str:
    """fnmatch's translation without the anchors it puts around: "(?s:" and ")\\Z" (")\\z" from Python 3.14 on)."""
    return fnmatch.translate(text)[len("(?s:") : -len(")\\Z")]


def _any_of(first: int, last: int) -> str:
    return "(?:" + "|".join(str(number) for number in range(first, last + 1)) + ")"


def value_for(path: str, values: Mapping[str, Value], default: Value) -> Value:
    """The value of the first pattern that means this path."""
    return next((value for pattern, value in values.items() if matches(path, pattern)), default)


def unmatched(patterns: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The patterns that mean none of the paths."""
    listed = list(paths)
    return [pattern for pattern in patterns if not any(matches(path, pattern) for path in listed)]
