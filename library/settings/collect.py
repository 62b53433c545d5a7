"""Reads all settings of a run: command line over file over defaults, typed and checked."""

from __future__ import annotations

import logging
import re
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
from library.settings.entries import COMMAND_LINE, Entry, Given
from library.settings.from_adapter import adapter_settings
from library.settings.groups import Settings, by_spelling, run_groups, shared_dataset_options, top_level_options
from library.settings.kohya_only import is_off
from library.settings.listing import PICTURE_SOURCES
from library.settings.resolve import resolve
from library.settings.root_style import Mapped, is_root_style, map_root_style
from library.settings.root_style_keys import DEFAULT_SOURCE
from library.settings.rules import check_settings, problems_of, wrong_numbers
from library.settings.toml_files import TomlFile, read_toml

logger = logging.getLogger(__name__)

# A length, data source or size given in a higher layer replaces its alternative in a lower one.
_REPLACES = {
    "max_train_steps": "max_train_epochs", "dataset_config": "train_data_dir", "resolution": "resolutions"
}  # fmt: skip
# Arguments that a file's form implies, but only for the optimizer or network it names.
_ARGUMENTS_OF = {"optimizer_type": "optimizer_args", "network_module": "network_args"}


def read_settings(argv: Sequence[str]) -> Settings:
    """The settings of a run from its command-line words (without the program's name).

    Raises SettingError listing every problem at once: of names and types first.
    """
    settings, problems = settings_and_problems(argv)
    _raise(problems)
    return settings


def settings_and_problems(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """The settings, and what is wrong with their files and combinations: for a report together with other checks.

    Raises SettingError for wrong names, types and numbers, with which models and pictures cannot be looked at; what
    else is wrong with the settings is told with them.
    """
    unread: list[str] = []
    problems: list[str] = []
    gathered = gather(argv, unread)
    settings = _settings_of(gathered, problems)
    if unread:
        _raise([*unread, *_certain([*problems, *problems_of(settings)], settings, unread)])
    problems += check_settings(settings)
    if not argv:
        problems.insert(0, "nothing is set: name a settings file by --config_file; configs/examples holds some to copy")
    if any(wrong_numbers(settings)):
        _raise(problems)
    return settings, problems


def _certain(problems: Sequence[str], settings: Settings, unread: Sequence[str]) -> list[str]:
    """The problems that hold whatever the settings say that could not be read, and now have their defaults.

    They name the source of something that was read, and nothing else that was written in vain.
    """
    sources = {f"{given.source}: {given.label}" for given in settings.given.values()}
    read = {name.rpartition(".")[2] for name in settings.given}
    in_vain = _words(unread) & (top_level_options().keys() - read)
    return [
        problem
        for problem in problems
        if any(source in problem for source in sources) and not _words([problem]) & in_vain
    ]


def _words(texts: Sequence[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"\w+", text)}


def resolve_settings(argv: Sequence[str], problems: list[str]) -> Settings:
    """The settings of a run as they are given, before values and combinations are checked.

    Raises SettingError listing every unknown name and wrong type; missing pictures and folders are added to `problems`.
    """
    unread: list[str] = []
    gathered = gather(argv, unread)
    _raise(unread)
    return _settings_of(gathered, problems)


def _settings_of(gathered: Gathered, problems: list[str]) -> Settings:
    given, tables = gathered.given, gathered.tables
    _log_root_style(gathered)
    datasets = datasets_from(gathered, problems)
    groups = {
        field: group(**{option.name: given[option.name].value for option in options_of(group) if option.name in given})
        for field, group in run_groups().items()
    }
    settings = Settings(**groups, datasets=datasets, given={**given, **_table_values(tables)})
    if gathered.is_root_style and settings.model.t5_tokenizer_dir is None:
        problems.append(
            "t5_tokenizer_dir is not set, which a root-style file must do: set model.t5_tokenizer_dir to a folder. It "
            "may be empty or not exist yet; the T5 tokenizer is then downloaded into it"
        )
    return settings


@dataclass(frozen=True)
class Gathered:
    """What was given, of all sources, before groups are made of it.

    given: the values by option name. tables: the dataset tables, where there are any. unmapped: keys of a root-style
    file that became nothing, each with the reason.
    """

    given: Mapping[str, Given]
    tables: DatasetTables | None
    unmapped: tuple[tuple[Entry, str], ...]
    is_root_style: bool


def gather(argv: Sequence[str], problems: list[str]) -> Gathered:
    """Reads and merges all sources. Unknown names and wrong types are added to `problems`."""
    command_line = parse_command_line(argv)
    config_file, adapter = command_line.program.config_file, command_line.program.from_adapter
    file = read_toml(_existing_config(config_file)) if config_file is not None else None
    written = _read_settings_file(file, problems)
    earlier = _read_settings_file(adapter_settings(adapter) if adapter is not None else None, problems)
    options = top_level_options()
    all_entries = (*earlier.layers, *written.layers, command_line.entries)
    given = _merged([resolve(entries, options, problems) for entries in all_entries])
    tables = written.tables
    if tables is None and not any(_is_set(given, name) for name in PICTURE_SOURCES):
        tables = earlier.tables
    return Gathered(given, _dataset_tables(given, tables, problems), written.unmapped, written.is_root_style)


@dataclass(frozen=True)
class _SettingsFile:
    """A settings file's layers, lowest first, the dataset tables that stand in it, and what it says in vain."""

    layers: tuple[Sequence[Entry], ...]
    tables: DatasetTables | None
    unmapped: tuple[tuple[Entry, str], ...] = ()
    is_root_style: bool = False


def _existing_config(path: Path) -> Path:
    """The file as named, or with the '.toml' that may be left off."""
    candidates = [path] if path.suffix == ".toml" else [path, path.with_name(f"{path.name}.toml")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise SettingError(f"--config_file: there is no file {' or '.join(map(str, candidates))}")


def _read_settings_file(file: TomlFile | None, problems: list[str]) -> _SettingsFile:
    if file is None:
        return _SettingsFile((), None)
    entries, tables = file.flat_entries(), None
    if "datasets" in file.tables:
        general = [entry for entry in entries if _is_dataset_general(entry)]
        tables = dataset_tables(file, general, problems)
        entries = [entry for entry in entries if entry.label != "datasets" and not _is_dataset_general(entry)]
    is_root = is_root_style(entries)
    mapped = map_root_style(entries, problems) if is_root else Mapped(tuple(entries))
    return _SettingsFile((mapped.defaults, mapped.entries), tables, mapped.unmapped, is_root)


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
        for name, arguments in _ARGUMENTS_OF.items():
            is_implied = arguments in merged and merged[arguments].source == DEFAULT_SOURCE
            if is_implied and name in layer and layer[name].source == COMMAND_LINE:
                del merged[arguments]
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


def picture_source_problems(gathered: Gathered) -> list[str]:
    """Pictures come from one place: a folder or dataset tables."""
    given, has_folder = gathered.given, _is_set(gathered.given, "train_data_dir")
    if gathered.tables is not None and has_folder:
        other = given["dataset_config"] if _is_set(given, "dataset_config") else "[[datasets]] in the settings file"
        return [f"{given['train_data_dir']} and {other} both name the pictures; keep one"]
    if gathered.tables is None and not has_folder:
        return ["no pictures are named: set train_data_dir to a folder, or dataset_config to a dataset TOML"]
    return []


def datasets_from(gathered: Gathered, problems: list[str]) -> tuple[DatasetSettings, ...]:
    """The datasets that were gathered; none, and a problem, where pictures are missing or named twice."""
    given, tables = gathered.given, gathered.tables
    if wrong := picture_source_problems(gathered):
        problems.extend(wrong)
        return ()
    if tables is not None:
        warn_of_overridden(tables, given)
        return datasets_from_tables(tables, given)
    try:
        reg_data_dir, in_json = (given[name].value if name in given else None for name in ("reg_data_dir", "in_json"))
        return (dataset_from_folder(given["train_data_dir"].value, given, reg_data_dir, in_json),)
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


def _log_root_style(gathered: Gathered) -> None:
    """Lists what a root-style file says in vain, unless it is off, and the form's defaults that are in use."""
    for entry, reason in gathered.unmapped:
        if not is_off(entry.value):
            logger.warning("%s: %s is not used: %s", entry.source, entry.label, reason)
    defaults = [f"{name} = {given.value}" for name, given in gathered.given.items() if given.source == DEFAULT_SOURCE]
    if defaults:
        logger.info("root-style defaults in use: %s", ", ".join(defaults))


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise SettingError("\n".join(problems))
