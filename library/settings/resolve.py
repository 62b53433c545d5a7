"""From written entries to named, converted values; every problem is gathered, none stops the reading."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from library.data.setting_values import are_several
from library.errors import did_you_mean
from library.options import Option, Secret
from library.settings.command_line import program_options
from library.settings.entries import Entry, Given
from library.settings.groups import by_spelling, dataset_options, run_options, subset_options, top_level_options
from library.settings.kohya_only import FIXED, NO_EFFECT, REFUSED, is_fixed_value, is_off
from library.values import convert, is_secret, says_nothing

logger = logging.getLogger(__name__)


def resolve(entries: Iterable[Entry], options: Mapping[str, Option], problems: list[str]) -> dict[str, Given]:
    """The values of one layer (a file, the command line) by option name.

    Unknown names, values of the wrong type and two spellings with different values are added to `problems`.
    """
    spellings = by_spelling(options)
    given: dict[str, Given] = {}
    for entry in map(_as_resolutions, entries):
        if entry.name not in spellings:
            _resolve_undeclared(entry, spellings, problems)
            continue
        option = spellings[entry.name]
        if says_nothing(option, entry.value):
            continue
        shown = replace(entry, value=Secret("")) if is_secret(option) else entry
        try:
            value = convert(option, entry.value)
        except ValueError as error:
            problems.append(f"{shown}: {error}")
            continue
        earlier = given.get(option.name)
        if earlier is not None and earlier.value != value:
            problems.append(f"{shown}: contradicts {earlier}; keep one")
        given[option.name] = Given(value, entry.source, entry.label)
    return given


def _as_resolutions(entry: Entry) -> Entry:
    """A resolution that can only mean several sizes, not a width and a height, is taken for resolutions."""
    return replace(entry, name="resolutions") if entry.name == "resolution" and are_several(entry.value) else entry


def _resolve_undeclared(entry: Entry, spellings: Iterable[str], problems: list[str]) -> None:
    if entry.name in NO_EFFECT:
        if not is_off(entry.value):
            logger.warning("%s: %s does nothing: %s", entry.source, entry.label, NO_EFFECT[entry.name])
    elif entry.name in FIXED:
        if not is_fixed_value(entry.name, entry.value):
            allowed = " or ".join(str(value).lower() for value in FIXED[entry.name])
            problems.append(f"{entry}: not available here; only {allowed} is. Change or remove it")
    elif entry.name in REFUSED:
        if not is_off(entry.value):
            # Without the value, which may be a secret.
            problems.append(f"{entry.source}: {entry.label} is not available here: {REFUSED[entry.name]}")
    elif entry.name in program_options():
        if not is_off(entry.value):
            problems.append(f"{entry.source}: {entry.label} belongs on the command line: --{entry.name}")
    elif entry.name in by_spelling({**top_level_options(), **subset_options()}):
        problems.append(f"{entry.source}: {entry.label} does not belong here; put it {_place(entry.name)}")
    else:
        problems.append(f"{entry.source}: unknown setting {entry.label}{did_you_mean(entry.name, spellings)}")


def _place(spelling: str) -> str:
    if spelling in by_spelling(run_options()):
        return "into the settings file or on the command line"
    if spelling in by_spelling(dataset_options()):
        return "under [general] or [[datasets]]"
    return "under [[datasets.subsets]]"
