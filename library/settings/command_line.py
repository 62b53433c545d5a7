"""The command line: one flag for each name and alias of an option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from library.errors import SettingError, did_you_mean
from library.options import Option, option, options_of
from library.settings.entries import COMMAND_LINE, Entry
from library.settings.groups import by_spelling, top_level_options
from library.settings.kohya_only import FIXED, NO_EFFECT, REFUSED
from library.values import convert, is_bool, takes_several

ALL_GROUPS = "all"


@dataclass(frozen=True)
class ProgramSettings:
    """Where settings are read from, and what is done instead of training. On the command line only."""

    config_file: Path | None = option(None, "TOML file of settings; '.toml' may be left off.")
    from_adapter: Path | None = option(
        None,
        "Adapter file (.safetensors) whose metadata tells the settings it was trained with: train again with them. "
        "config_file and the command line win over it; what it does not tell is listed.",
    )
    explain: bool = option(False, "Show every setting's value and where it comes from, and stop.")
    print_options: str | None = option(
        None, "Show what can be set, with defaults and advice, and stop: all of it, or one group, such as network."
    )
    output_config: Path | None = option(
        None, "Write all settings to this TOML file, from which config_file gives the same run again, and stop."
    )


@dataclass(frozen=True)
class CommandLine:
    """What was typed: the program's own flags, and every setting given."""

    program: ProgramSettings
    entries: tuple[Entry, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{COMMAND_LINE}: {message}")


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Reads the flags; SettingError names every unknown one. Values stay text, and are converted as a file's are."""
    options = by_spelling(top_level_options())
    namespace, unknown = _parser(options).parse_known_args(list(argv))
    if unknown:
        raise SettingError(_unknown_message(unknown, [*options, *program_options()]))
    typed = vars(namespace)
    program = ProgramSettings(
        **{name: _own(each, typed.pop(name)) for name, each in program_options().items() if name in typed}
    )
    entries = tuple(Entry(name, value, COMMAND_LINE, f"--{name}") for name, value in typed.items())
    return CommandLine(program, entries)


def program_options() -> dict[str, Option]:
    """The flags that are no settings of a run, by name."""
    return {each.name: each for each in options_of(ProgramSettings)}


def _own(declared: Option, typed: Any) -> Any:
    try:
        return convert(declared, typed)
    except ValueError as error:
        raise SettingError(f"{COMMAND_LINE}: --{declared.name}: {error}") from error


def _parser(options: dict[str, Option]) -> _Parser:
    """Only flags that were typed appear in the result, each under its own spelling."""
    parser = _Parser(
        description="Trains an adapter for the Anima text-to-image model.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for spelling, declared in {**program_options(), **options}.items():
        parser.add_argument(f"--{spelling}", dest=spelling, **_flag_form(spelling, declared))
    for name in (*NO_EFFECT, *FIXED, *REFUSED):
        if name not in options:
            parser.add_argument(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def _flag_form(spelling: str, declared: Option) -> dict[str, Any]:
    text = declared.help if spelling == declared.name else f"Same as --{declared.name}."
    form: dict[str, Any] = {"help": text.replace("%", "%%")}
    if is_bool(declared):
        return {**form, "action": argparse.BooleanOptionalAction}
    form["metavar"] = "{" + ",".join(map(str, declared.choices)) + "}" if declared.choices else "VALUE"
    if declared.name == "print_options":
        return {**form, "metavar": "GROUP", "nargs": "?", "const": ALL_GROUPS}
    return {**form, "nargs": "*"} if takes_several(declared) else form


def _unknown_message(unknown: Sequence[str], known: Sequence[str]) -> str:
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        words = " ".join(unknown)
        return f"{COMMAND_LINE}: {words!r} follows no option; a switch takes no value: write --NAME or --no-NAME"
    flag_names = [f"--{name}" for name in known]
    return "\n".join(f"{COMMAND_LINE}: unknown option {flag}{did_you_mean(flag, flag_names)}" for flag in flags)
