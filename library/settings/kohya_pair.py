"""Writes gathered settings as Kohya's two files, with what each value was written as beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.data.settings import SubsetSettings
from library.options import Secret, options_of
from library.settings.collect import Gathered, datasets_from
from library.settings.dataset_toml import DatasetTable, DatasetTables
from library.settings.entries import Given
from library.settings.groups import dataset_options, run_groups, shared_dataset_options
from library.settings.listing import PICTURE_SOURCES
from library.settings.root_style_keys import DEFAULT_SOURCE
from library.settings.toml_files import toml_value

logger = logging.getLogger(__name__)

Values = Mapping[str, Given]


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
            if option.name in gathered.given and option.name not in PICTURE_SOURCES
        }
        if values:
            train_args += ["", f"[{heading}]", *_lines(values)]
    return KohyaPair("\n".join(train_args) + "\n", "\n".join([head, *_dataset_lines(_tables(gathered))]) + "\n")


def _unmapped_lines(gathered: Gathered) -> list[str]:
    """Names without values, of which one may be a key to a service."""
    if not gathered.unmapped:
        return []
    return ["# Not mapped:", *(f"#   {entry.label}: {why}" for entry, why in gathered.unmapped)]


def _lines(values: Values, indent: str = "") -> list[str]:
    return [indent + _line(name, given) for name, given in values.items()]


def _line(name: str, given: Given) -> str:
    """`name = value  # what it was written as`; an unset value is an empty text, and a secret is not copied."""
    origin = given.source if given.source == DEFAULT_SOURCE else given.label
    if isinstance(given.value, Secret):
        return f"# {name}: give it again; secrets are not copied  # {origin}"
    return f"{name} = {toml_value('' if given.value is None else given.value)}  # {origin}"


def _tables(gathered: Gathered) -> DatasetTables:
    """The dataset tables, with what lies below them: values for all datasets that stand outside."""
    fallback = {name: gathered.given[name] for name in shared_dataset_options() if name in gathered.given}
    if gathered.tables is not None:
        return DatasetTables({**fallback, **gathered.tables.general}, gathered.tables.datasets)
    own = {name: given for name, given in fallback.items() if name in dataset_options()}
    general = {name: given for name, given in fallback.items() if name not in own}
    repeats = general.pop("num_repeats", Given(1, DEFAULT_SOURCE, "num_repeats"))
    subsets = tuple(_subset(subset, gathered, general, repeats) for subset in _found(gathered, general, repeats))
    return DatasetTables(general, (DatasetTable(own, subsets),))


def _found(gathered: Gathered, general: Values, repeats: Given) -> tuple[SubsetSettings, ...]:
    """A subset for each folder of pictures; for the folder itself where it is not on this machine."""
    problems: list[str] = []
    datasets = datasets_from(gathered, problems)
    if datasets:
        return datasets[0].subsets
    logger.warning("%s; the dataset file names this folder alone", "; ".join(problems))
    common = {name: given.value for name, given in general.items()}
    return (SubsetSettings(**common, image_dir=gathered.given["train_data_dir"].value, num_repeats=repeats.value),)


def _subset(subset: SubsetSettings, gathered: Gathered, general: Values, repeats: Given) -> Values:
    """What a folder's subset has of its own: the folder, its repeats, and what else follows from where it lies."""
    is_other = subset.is_reg and "reg_data_dir" in gathered.given
    folder = gathered.given["reg_data_dir" if is_other else "train_data_dir"]
    values = {"image_dir": Given(subset.image_dir, folder.source, folder.label), "num_repeats": repeats}
    for option in options_of(SubsetSettings):
        value = getattr(subset, option.name)
        common = {**general, **values}.get(option.name)
        if value != (common.value if common is not None else option.default):
            values[option.name] = Given(value, folder.source, "its folder")
    return values


def _dataset_lines(tables: DatasetTables) -> list[str]:
    lines = ["", "[general]", *_lines(tables.general)] if tables.general else []
    for dataset in tables.datasets:
        lines += ["", "[[datasets]]", *_lines(dataset.values)]
        for subset in dataset.subsets:
            lines += ["", "  [[datasets.subsets]]", *_lines(subset, "  ")]
    return lines
