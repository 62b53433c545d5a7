"""The command line: one flag for each name and alias of an option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from library.errors import SettingError, did_you_mean
from library.options import Option
from library.settings.entries import COMMAND_LINE, Entry
from library.settings.groups import by_spelling, top_level_options
from library.settings.kohya_only import FIXED, NO_EFFECT
from library.values import is_bool, takes_several


@dataclass(frozen=True)
class CommandLine:
    """What was typed: the settings file, and every flag given."""

    config_file: Path | None
    entries: tuple[Entry, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{COMMAND_LINE}: {message}")


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Reads the flags; SettingError names every unknown one. Values stay text, and are converted as a file's are."""
    options = by_spelling(top_level_options())
    namespace, unknown = _parser(options).parse_known_args(list(argv))
    if unknown:
        raise SettingError(_unknown_message(unknown, [*options, "config_file"]))
    typed = vars(namespace)
    config_file = typed.pop("config_file", None)
    entries = tuple(Entry(name, value, COMMAND_LINE, f"--{name}") for name, value in typed.items())
    return CommandLine(Path(config_file) if config_file is not None else None, entries)


def _parser(options: dict[str, Option]) -> _Parser:
    """Only flags that were typed appear in the result, each under its own spelling."""
    parser = _Parser(
        description="Trains an adapter for the Anima text-to-image model.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config_file", metavar="FILE", help="TOML file of settings; '.toml' may be left off.")
    for spelling, option in options.items():
        parser.add_argument(f"--{spelling}", dest=spelling, **_flag_form(spelling, option))
    for name in (*NO_EFFECT, *FIXED):
        if name not in options:
            parser.add_argument(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def _flag_form(spelling: str, option: Option) -> dict[str, Any]:
    text = option.help if spelling == option.name else f"Same as --{option.name}."
    form: dict[str, Any] = {"help": text.replace("%", "%%")}
    if is_bool(option):
        return {**form, "action": argparse.BooleanOptionalAction}
    form["metavar"] = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else "VALUE"
    return {**form, "nargs": "+"} if takes_several(option) else form


def _unknown_message(unknown: Sequence[str], known: Sequence[str]) -> str:
    flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not flags:
        words = " ".join(unknown)
        return f"{COMMAND_LINE}: {words!r} follows no option; a switch takes no value: write --NAME or --no-NAME"
    flag_names = [f"--{name}" for name in known]
    return "\n".join(f"{COMMAND_LINE}: unknown option {flag}{did_you_mean(flag, flag_names)}" for flag in flags)
