"""How a component declares its settings: a frozen dataclass whose fields are made by `option()`.

    @dataclass(frozen=True)
    class SavingSettings:
        '''Where adapter files go.'''

        output_dir: Path = option(Path("output"), "Folder for everything a run writes.")

`library.settings` collects such groups into the command line, the TOML schema and the reference page.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import SettingError

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """One declared setting.

    type: the field's resolved annotation (bool, int, float, str, Path, tuple[str, ...], or one of them | None).
    parse: turns the raw TOML or command-line value into the setting's value where the type alone does not say how;
        it raises ValueError with the expected form.
    """

    name: str
    type: Any
    default: Any
    help: str
    aliases: tuple[str, ...]
    choices: tuple[Any, ...] | None
    parse: Callable[[Any], Any] | None
    group: type


def option(
    default: Any,
    help: str,
    *,
    aliases: Sequence[str] = (),
    choices: Sequence[Any] | None = None,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """Declares one field of a settings dataclass: its default, help text, other accepted names and allowed values."""
    declaration = {
        "help": help,
        "aliases": tuple(aliases),
        "choices": tuple(choices) if choices is not None else None,
        "parse": parse,
    }
    return dataclasses.field(default=default, metadata={_KEY: declaration})


def options_of(group: type) -> tuple[Option, ...]:
    """The options a settings dataclass declares, in the order of its fields."""
    types = typing.get_type_hints(group)
    return tuple(
        Option(name=field.name, type=types[field.name], default=field.default, group=group, **field.metadata[_KEY])
        for field in dataclasses.fields(group)
        if _KEY in field.metadata
    )


def split_arguments(setting: str, entries: Sequence[str]) -> dict[str, str]:
    """('dim=4', 'name=x') -> {'dim': '4', 'name': 'x'}; SettingError for an entry without '='."""
    arguments = {}
    for entry in entries:
        name, separator, text = entry.partition("=")
        if not separator or not name.strip():
            raise SettingError(f"{setting}: {entry!r} is not of the form key=value")
        arguments[name.strip()] = text.strip()
    return arguments
