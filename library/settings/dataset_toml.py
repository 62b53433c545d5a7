"""Dataset tables: [general] -> [[datasets]] -> [[datasets.subsets]], where inner values win over outer ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.data.folders import find_subsets
from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import did_you_mean
from library.options import Option
from library.settings.entries import COMMAND_LINE, Entry, Given
from library.settings.groups import by_spelling, dataset_options, shared_dataset_options, subset_options
from library.settings.resolve import resolve
from library.settings.toml_files import KeyPath, TomlFile

logger = logging.getLogger(__name__)

Values = Mapping[str, Given]

# What names a subset's pictures.
_PICTURES = {"image_dir", "metadata_file"}


@dataclass(frozen=True)
class DatasetTable:
    """One [[datasets]] table: its own values, and those of each of its subsets."""

    values: Values
    subsets: tuple[Values, ...]


@dataclass(frozen=True)
class DatasetTables:
    """Everything a dataset TOML says."""

    general: Values
    datasets: tuple[DatasetTable, ...]

    def levels(self) -> Iterator[tuple[str, Values]]:
        """Each table's values, with the prefix that names them in Settings.given."""
        yield "general.", self.general
        for i, dataset in enumerate(self.datasets):
            yield f"datasets[{i}].", dataset.values
            for j, values in enumerate(dataset.subsets):
                yield f"datasets[{i}].subsets[{j}].", values


def read_dataset_tables(file: TomlFile, problems: list[str]) -> DatasetTables:
    """The tables `general` and `datasets` of a file; other keys at its top are problems."""
    for key in file.tables:
        if key not in ("general", "datasets"):
            problems.append(
                f"{file.source(key)}: {key} does not belong at the top of a dataset file; "
                "put options under [general], [[datasets]] or [[datasets.subsets]]"
            )
    general = file.tables.get("general", {})
    if not isinstance(general, dict):
        problems.append(f"{file.source('general')}: general must be a table: [general]")
        general = {}
    return dataset_tables(file, file.entries(general, "general"), problems)


def dataset_tables(file: TomlFile, general: Sequence[Entry], problems: list[str]) -> DatasetTables:
    """The [[datasets]] of a file, with the values of its [general]."""
    datasets = _tables(file, ("datasets",), file.tables.get("datasets"), problems)
    return DatasetTables(
        resolve(general, shared_dataset_options(), problems),
        tuple(_dataset_table(file, ("datasets", i), table, problems) for i, table in enumerate(datasets)),
    )


def _dataset_table(file: TomlFile, key_path: KeyPath, table: dict[str, Any], problems: list[str]) -> DatasetTable:
    own = {key: value for key, value in table.items() if key != "subsets"}
    subset_path = (*key_path, "subsets")
    subsets = _tables(file, subset_path, table.get("subsets"), problems)
    return DatasetTable(
        resolve(file.entries(own, *key_path), shared_dataset_options(), problems),
        tuple(_subset_values(file, (*subset_path, index), values, problems) for index, values in enumerate(subsets)),
    )


def _subset_values(file: TomlFile, key_path: KeyPath, table: dict[str, Any], problems: list[str]) -> Values:
    values = resolve(file.entries(table, *key_path), subset_options(), problems)
    others = by_spelling(subset_options()).keys() - _PICTURES
    if not any(name in _PICTURES or did_you_mean(name, _PICTURES) for name in table if name not in others):
        problems.append(
            f"{file.source(*key_path)}: this subset has no image_dir; name its picture folder, or a metadata_file"
        )
    return values


def _tables(file: TomlFile, key_path: KeyPath, value: Any, problems: list[str]) -> list[dict[str, Any]]:
    """An array of at least one table; anything else is a problem."""
    name = ".".join(part for part in key_path if isinstance(part, str))
    if isinstance(value, list) and value and all(isinstance(table, dict) for table in value):
        return value
    problems.append(f"{file.source(*key_path)}: at least one table [[{name}]] is needed")
    return []


def datasets_from_tables(tables: DatasetTables, fallback: Values) -> tuple[DatasetSettings, ...]:
    """The datasets of the tables; `fallback` holds values from outside them, which any table's own value wins over."""
    return tuple(
        DatasetSettings(
            **_picked(_layered(fallback, tables.general, dataset.values), dataset_options()),
            subsets=tuple(
                SubsetSettings(**_picked({**fallback, **tables.general, **dataset.values, **own}, subset_options()))
                for own in dataset.subsets
            ),
        )
        for dataset in tables.datasets
    )


def _layered(*levels: Values) -> Values:
    """What later, inner levels say wins; so does a resolution there over resolutions further out."""
    values: dict[str, Given] = {}
    for level in levels:
        if "resolution" in level:
            values.pop("resolutions", None)
        values.update(level)
    return values


def dataset_from_folder(
    folder: Path, values: Values, regularisation: Path | None = None, metadata: Path | None = None
) -> DatasetSettings:
    """One dataset with a subset for each folder of pictures in `folder`, and in the one of regularisation pictures.

    metadata: a file that names the pictures of `folder`, which then are one subset. Raises DataError where there are
    none.
    """
    common = SubsetSettings(**_picked(values, subset_options()))
    if metadata is None:
        subsets = find_subsets(folder, common)
    else:
        subsets = (replace(common, image_dir=folder, metadata_file=metadata),)
    if regularisation is not None:
        subsets += find_subsets(regularisation, replace(common, is_reg=True))
    return DatasetSettings(**_picked(values, dataset_options()), subsets=subsets)


def warn_of_overridden(tables: DatasetTables, fallback: Values) -> None:
    """Says which dataset options of the command line the tables, being more specific, replace."""
    for name in shared_dataset_options():
        typed = fallback.get(name)
        if typed is None or typed.source != COMMAND_LINE:
            continue
        winners = [level[name] for _, level in tables.levels() if name in level and level[name].value != typed.value]
        if winners:
            logger.warning("%s gives way to the dataset tables: %s", typed, ", ".join(map(str, winners)))


def _picked(values: Values, options: Mapping[str, Option]) -> dict[str, Any]:
    return {name: values[name].value for name in options if name in values}
