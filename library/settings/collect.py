"""Reads all settings of a run: command line over file over defaults, typed and checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.settings import DatasetSettings
from library.errors import DataError, SettingError
from library.options import options_of
from library.settings.command_line import parse_command_line
from library.settings.dataset_toml import (
    DatasetTables,
    dataset_from_folder,
    dataset_tables,
    datasets_from_tables,
    read_dataset_tables,
    warn_of_overridden,
)
from library.settings.entries import Entry, Given
from library.settings.groups import Settings, by_spelling, run_groups, shared_dataset_options, top_level_options
from library.settings.resolve import resolve
from library.settings.root_style import Mapped, is_root_style, map_root_style
from library.settings.root_style_keys import DEFAULT_SOURCE
from library.settings.rules import check_settings
from library.settings.toml_files import TomlFile, read_toml

logger = logging.getLogger(__name__)

# A length or data source given in a higher layer replaces its alternative in a lower one.
_REPLACES = {"max_train_steps": "max_train_epochs", "dataset_config": "train_data_dir"}


def read_settings(argv: Sequence[str]) -> Settings:
    """The settings of a run from its command-line words (without the program's name).

    Raises SettingError listing every problem at once: first of names and types, then of values and combinations.
    """
    command_line = parse_command_line(argv)
    problems: list[str] = []
    file = read_toml(_existing_config(command_line.config_file)) if command_line.config_file is not None else None
    written = _read_settings_file(file, problems)
    options = top_level_options()
    layers = [resolve(entries, options, problems) for entries in (*written.layers, command_line.entries)]
    given = _merged(layers)
    tables = _dataset_tables(given, written.tables, problems)
    _raise(problems)
    _log_defaults(given)
    datasets = _datasets(given, tables, problems)
    groups = {
        field: group(**{option.name: given[option.name].value for option in options_of(group) if option.name in given})
        for field, group in run_groups().items()
    }
    settings = Settings(**groups, datasets=datasets, given={**given, **_table_values(tables)})
    problems += check_settings(settings)
    _raise(problems)
    return settings


@dataclass(frozen=True)
class _SettingsFile:
    """A settings file's layers, lowest first, and the dataset tables that stand in it."""

    layers: tuple[Sequence[Entry], ...]
    tables: DatasetTables | None


def _existing_config(path: Path) -> Path:
    """The file as named, or with the '.toml' that may be left off."""
    for candidate in (path, path.with_name(f"{path.name}.toml")):
        if candidate.is_file():
            return candidate
    raise SettingError(f"--config_file: there is no file {path} or {path}.toml")


def _read_settings_file(file: TomlFile | None, problems: list[str]) -> _SettingsFile:
    if file is None:
        return _SettingsFile((), None)
    entries, tables = file.flat_entries(), None
    if "datasets" in file.tables:
        general = [entry for entry in entries if _is_dataset_general(entry)]
        tables = dataset_tables(file, general, problems)
        entries = [entry for entry in entries if entry.label != "datasets" and not _is_dataset_general(entry)]
    mapped = map_root_style(entries, problems) if is_root_style(entries) else Mapped(tuple(entries), ())
    return _SettingsFile((mapped.defaults, mapped.entries), tables)


def _is_dataset_general(entry: Entry) -> bool:
    """Beside [[datasets]], dataset options under [general] belong to those; other options there are the run's."""
    return entry.label.startswith("general.") and entry.name in by_spelling(shared_dataset_options())


def _merged(layers: Sequence[Mapping[str, Given]]) -> dict[str, Given]:
    """Higher layers, which come later, win."""
    merged: dict[str, Given] = {}
    for layer in layers:
        for winner, loser in _REPLACES.items():
            if _is_set(layer, winner) and loser not in layer and loser in merged:
                replaced = merged.pop(loser)
                if replaced.source != DEFAULT_SOURCE:
                    logger.warning("%s replaces %s", layer[winner], replaced)
        merged.update(layer)
    return merged


def _dataset_tables(
    given: Mapping[str, Given], inline: DatasetTables | None, problems: list[str]
) -> DatasetTables | None:
    """The tables of dataset_config, or else those in the settings file itself."""
    if not _is_set(given, "dataset_config"):
        return inline
    if inline is not None:
        logger.warning("%s replaces the [[datasets]] of the settings file", given["dataset_config"])
    return read_dataset_tables(read_toml(given["dataset_config"].value), problems)


def _datasets(
    given: Mapping[str, Given], tables: DatasetTables | None, problems: list[str]
) -> tuple[DatasetSettings, ...]:
    has_folder = _is_set(given, "train_data_dir")
    if tables is not None and has_folder:
        other = given["dataset_config"] if _is_set(given, "dataset_config") else "[[datasets]] in the settings file"
        problems.append(f"{given['train_data_dir']} and {other} both name the pictures; keep one")
        return ()
    if tables is not None:
        warn_of_overridden(tables, given)
        return datasets_from_tables(tables, given)
    if not has_folder:
        problems.append("no pictures are named: set train_data_dir to a folder, or dataset_config to a dataset TOML")
        return ()
    try:
        return (dataset_from_folder(given["train_data_dir"].value, given),)
    except DataError as error:
        folder = given["train_data_dir"]
        problems.append(f"{folder.source}: {folder.label}: {error}")
        return ()


def _table_values(tables: DatasetTables | None) -> dict[str, Given]:
    if tables is None:
        return {}
    return {prefix + name: value for prefix, values in tables.levels() for name, value in values.items()}


def _is_set(given: Mapping[str, Given], name: str) -> bool:
    return name in given and given[name].value is not None


def _log_defaults(given: Mapping[str, Given]) -> None:
    defaults = [f"{name} = {value.value}" for name, value in given.items() if value.source == DEFAULT_SOURCE]
    if defaults:
        logger.info("root-style defaults in use: %s", ", ".join(defaults))


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise SettingError("\n".join(problems))
