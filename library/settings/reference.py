"""All options as they are declared: for --print_options, and for the reference pages."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import SettingError, did_you_mean
from library.options import Option, Secret, options_of
from library.settings.command_line import ALL_GROUPS, ProgramSettings
from library.settings.groups import run_groups
from library.settings.toml_files import toml_value
from library.values import kinds

_TYPE_NAMES = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    Secret: "secret text",
    tuple: "list",
}


@dataclass(frozen=True)
class OptionGroup:
    """Options declared together. purpose: what they are for, in a line."""

    name: str
    purpose: str
    options: tuple[Option, ...]


def option_groups() -> dict[str, OptionGroup]:
    """All options by the name of their group, in the order of a settings file; the command line's own come first."""
    classes = {"program": ProgramSettings, **run_groups(), "datasets": DatasetSettings, "subsets": SubsetSettings}
    return {
        name: OptionGroup(name, (group.__doc__ or "").partition("\n")[0], options_of(group))
        for name, group in classes.items()
    }


def options_text(group: str) -> str:
    """The options of a group, or of "all", for the terminal. Raises SettingError for an unknown group."""
    groups = option_groups()
    if group != ALL_GROUPS and group not in groups:
        known = f"; there are {ALL_GROUPS}, {', '.join(groups)}"
        raise SettingError(f"--print_options: no group {group!r}{did_you_mean(group, groups)}{known}")
    chosen = groups.values() if group == ALL_GROUPS else [groups[group]]
    return "\n".join(_group_text(each) for each in chosen)


def type_text(option: Option) -> str:
    """What a value looks like: "whole number", "one of no, fp16, bf16"."""
    if option.choices is not None:
        return f"one of {', '.join(map(str, option.choices))}"
    return " or ".join(type_words(option))


def type_words(option: Option) -> list[str]:
    """What kinds of value it takes: ["whole number", "number"]."""
    return [_TYPE_NAMES[kind] for kind in kinds(option)]


def default_text(option: Option) -> str:
    """The default as a settings file would hold it; "unset" for none."""
    return "unset" if option.default is None else toml_value(option.default)


def _group_text(group: OptionGroup) -> str:
    lines = [f"[{group.name}]  {group.purpose}"]
    for option in group.options:
        aliases = f"; also {', '.join(option.aliases)}" if option.aliases else ""
        lines.append(f"  {option.name} = {default_text(option)}  ({type_text(option)}{aliases})")
        lines.append(textwrap.fill(option.help, 110, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines) + "\n"
