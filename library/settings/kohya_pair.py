"""Writes gathered settings as Kohya's two files, with what each value was written as beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.settings import SubsetSettings
from library.errors import DataError
from library.options import options_of
from library.settings.collect import Gathered
from library.settings.dataset_toml import DatasetTable, DatasetTables, dataset_from_folder
from library.settings.entries import Given
from library.settings.groups import dataset_options, run_groups, subset_options
from library.settings.root_style_keys import DEFAULT_SOURCE

logger = logging.getLogger(__name__)

Values = Mapping[str, Given]

# What says where the pictures are: the dataset file does so in the pair.
_PICTURE_SOURCES = ("train_data_dir", "dataset_config")


@dataclass(frozen=True)
class KohyaPair:
    """The texts of the two files."""

    train_args: str
    dataset: str


def write_pair(gathered: Gathered, source: Path) -> KohyaPair:
    """The files that resolve to the same settings as `source`, from which `gathered` was read.

    Each folder of pictures below train_data_dir becomes a subset of its own.
    """
    head = f"# Converted from {source.name}. Paths are relative to the folder the trainer is started in."
    train_args = [head, *_unmapped_lines(gathered)]
    for heading, group in run_groups().items():
        values = {
            option.name: gathered.given[option.name]
            for option in options_of(group)
            if option.name in gathered.given and option.name not in _PICTURE_SOURCES
        }
        if values:
            train_args += ["", f"[{heading}]", *_lines(values)]
    return KohyaPair("\n".join(train_args) + "\n", "\n".join([head, *_dataset_lines(_tables(gathered))]) + "\n")


def toml_value(value: Any) -> str:
    """A setting's value as TOML; an unset one is an empty text."""
    if value is None:
        return '""'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    # A JSON text is a TOML one but for the character 127.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _unmapped_lines(gathered: Gathered) -> list[str]:
    if not gathered.unmapped:
        return []
    return ["# Not mapped:", *(f"#   {entry.label} = {entry.value!r}: {why}" for entry, why in gathered.unmapped)]


def _lines(values: Values, indent: str = "") -> list[str]:
    return [f"{indent}{name} = {toml_value(given.value)}  # {_origin(given)}" for name, given in values.items()]


def _origin(given: Given) -> str:
    return given.source if given.source == DEFAULT_SOURCE else given.label


def _tables(gathered: Gathered) -> DatasetTables:
    """The dataset tables, with what lies below them: values for all datasets that stand outside."""
    fallback = {name: gathered.given[name] for name in _dataset_names() if name in gathered.given}
    if gathered.tables is None:
        return _tables_of_folder(gathered.given["train_data_dir"], fallback)
    general = {**fallback, **gathered.tables.general}
    return DatasetTables(general, gathered.tables.datasets)


def _tables_of_folder(folder: Given, fallback: Values) -> DatasetTables:
    """One dataset with a subset for each folder of pictures; for the folder itself where it is not on this machine."""
    own = {name: given for name, given in fallback.items() if name in dataset_options()}
    general = {name: given for name, given in fallback.items() if name not in own}
    repeats = general.pop("num_repeats", Given(1, DEFAULT_SOURCE, "num_repeats"))
    try:
        found = dataset_from_folder(folder.value, fallback).subsets
    except DataError as error:
        logger.warning("%s: %s: %s; the dataset file names this folder alone", folder.source, folder.label, error)
        found = (SubsetSettings(image_dir=folder.value, num_repeats=repeats.value),)
    subsets = tuple(_subset(subset, folder, general, repeats) for subset in found)
    return DatasetTables(general, (DatasetTable(own, subsets),))


def _subset(subset: SubsetSettings, folder: Given, general: Values, repeats: Given) -> Values:
    """What a folder's subset has of its own: the folder, its repeats, and what else its name says."""
    values = {"image_dir": Given(subset.image_dir, folder.source, folder.label), "num_repeats": repeats}
    for option in options_of(SubsetSettings):
        value = getattr(subset, option.name)
        common = {**general, **values}.get(option.name)
        if value != (common.value if common is not None else option.default):
            values[option.name] = Given(value, folder.source, "the folder's name")
    return values


def _dataset_lines(tables: DatasetTables) -> list[str]:
    lines = ["", "[general]", *_lines(tables.general)] if tables.general else []
    for dataset in tables.datasets:
        lines += ["", "[[datasets]]", *_lines(dataset.values)]
        for subset in dataset.subsets:
            lines += ["", "  [[datasets.subsets]]", *_lines(subset, "  ")]
    return lines


def _dataset_names() -> Iterable[str]:
    return [*dataset_options(), *subset_options()]
