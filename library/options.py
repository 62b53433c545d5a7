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

    type: the field's resolved annotation (bool, int, float, str, Path, Secret, tuple[str, ...], tuple[Path, ...], or
        one of them but the last | None).
    parse: turns the raw TOML or command-line value into the setting's value where the type alone does not say how;
        it raises ValueError with the expected form.
    zero_is_unset: whether 0 means the same as leaving it out: "save every 0 steps" is never.
    """

    name: str
    type: Any
    default: Any
    help: str
    aliases: tuple[str, ...]
    choices: tuple[Any, ...] | None
    parse: Callable[[Any], Any] | None
    zero_is_unset: bool
    group: type


class Secret:
    """A text that only one service may see, such as an API key: declare the field as `Secret | None`.

    Printing, logging and formatting show "(hidden)", and no file that a run writes holds it. It is no dataclass, so
    that `dataclasses.asdict` does not open it.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return "(hidden)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


def option(
    default: Any,
    help: str,
    *,
    aliases: Sequence[str] = (),
    choices: Sequence[Any] | None = None,
    parse: Callable[[Any], Any] | None = None,
    zero_is_unset: bool = False,
) -> Any:
    """Declares one field of a settings dataclass: its default, help text, other accepted names and allowed values."""
    declaration = {
        "help": help,
        "aliases": tuple(aliases),
        "choices": tuple(choices) if choices is not None else None,
        "parse": parse,
        "zero_is_unset": zero_is_unset,
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
    """('dim=4', 'name=x') -> {'dim': '4', 'name': 'x'}; SettingError for entries without '='."""
    problems: list[str] = []
    arguments = key_values(setting, entries, problems)
    if problems:
        raise SettingError("\n".join(problems))
    return arguments


def key_values(setting: str, entries: Sequence[str], problems: list[str]) -> dict[str, str]:
    """As `split_arguments`; entries without '=' are left out, and added to `problems`."""
    arguments = {}
    for entry in entries:
        name, separator, text = entry.partition("=")
        if not separator or not name.strip():
            problems.append(f"{setting}: {entry!r} is not of the form key=value")
        else:
            arguments[name.strip()] = text.strip()
    return arguments
