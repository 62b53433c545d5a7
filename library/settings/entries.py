"""A setting as somebody wrote it, before it is named, converted and checked."""

from __future__ import annotations

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
