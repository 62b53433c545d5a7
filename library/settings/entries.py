"""A setting as somebody wrote it, before it is named, converted and checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Entry:
    """One written value.

    name: the spelling to look up: an option's name or alias.
    value: as TOML or the command line gave it.
    source: "command line", or file and line: "my.toml:12".
    label: how its author wrote the key, for messages: "training.seed", "--seed".
    """

    name: str
    value: Any
    source: str
    label: str

    def __str__(self) -> str:
        text = repr(self.value)
        return f"{self.source}: {self.label} = {text if len(text) <= 80 else text[:77] + '...'}"


@dataclass(frozen=True)
class Given:
    """A converted value, with its source and the key it was written under."""

    value: Any
    source: str
    label: str

    def __str__(self) -> str:
        return f"{self.label} = {self.value} ({self.source})"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean a or b?" for the nearest known words, else for those that contain the word; "" for none."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    if not near and len(word) > 3:
        near = [name for name in by_lower if word.lower() in name][:3]
    return f"; did you mean {' or '.join(by_lower[name] for name in near)}?" if near else ""
