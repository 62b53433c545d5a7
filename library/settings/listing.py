"""All settings of a run as text: to read, with where each came from, and as TOML that gives the same run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options import Option, Secret, options_of
from library.settings.groups import (
    Settings,
    dataset_options,
    run_groups,
    settings_as_flat_dict,
    shared_dataset_options,
    subset_options,
)
from library.settings.origins import given_at
from library.settings.toml_files import toml_value

# Where the comments begin; longer lines push theirs to the right.
_COMMENT_COLUMN = 48
_DEFAULT = "default"

# What says where the pictures are: the [[datasets]] of the text do.
PICTURE_SOURCES = ("dataset_config", "train_data_dir", "reg_data_dir", "in_json")

# What belongs to one folder, and says nothing of another.
_OF_ONE_FOLDER = {
    "image_dir", "metadata_file", "conditioning_data_dir", "num_repeats", "class_tokens", "is_reg"
}  # fmt: skip


@dataclass(frozen=True)
class _Setting:
    """One resolved value as JSON holds it (None: unset), and where it came from."""

    name: str
    value: Any
    source: str


def explanation(settings: Settings) -> str:
    """Every setting with its value and source, under the headings of the groups."""
    return "\n".join(_lines(settings, as_config=False)) + "\n"


def config_text(settings: Settings) -> str:
    """A settings file that gives the same settings again; what has its default stands in it as a comment.

    The pictures are written out as [[datasets]], whatever named them. Secrets are left out.
    """
    return "\n".join(_lines(settings, as_config=True)) + "\n"


def lift_shared(datasets: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Splits datasets of `settings_as_flat_dict` into what all share, and the rest of each and of its subsets.

    What is shared can stand above the datasets, where the command line may replace it.
    """
    subsets = [subset for dataset in datasets for subset in dataset["subsets"]]
    shared = {
        name: tables[0][name]
        for options, tables in ((dataset_options(), datasets), (subset_options(), subsets))
        for name in options
        if name not in _OF_ONE_FOLDER and tables and all(table[name] == tables[0][name] for table in tables)
    }

    def rest(table: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in table.items() if name not in shared}

    return shared, [{**rest(dataset), "subsets": [rest(each) for each in dataset["subsets"]]} for dataset in datasets]


def _lines(settings: Settings, as_config: bool) -> Iterator[str]:
    flat = settings_as_flat_dict(settings, Path.as_posix)
    shared, datasets = lift_shared(flat["datasets"])
    for field, group in run_groups().items():
        yield f"[{field}]"
        for option in options_of(group):
            yield _line(_setting(settings, option, flat[option.name]), as_config)
        yield ""
    yield "[pictures]"
    for name, value in shared.items():
        first = "datasets[0].subsets[0]." if name in subset_options() else "datasets[0]."
        yield _line(_setting(settings, shared_dataset_options()[name], value, first), as_config)
    for i, dataset in enumerate(datasets):
        yield from ("", "[[datasets]]")
        yield from _table_lines(settings, dataset, dataset_options(), f"datasets[{i}].", as_config)
        for j, subset in enumerate(dataset["subsets"]):
            yield from ("", "[[datasets.subsets]]")
            yield from _table_lines(settings, subset, subset_options(), f"datasets[{i}].subsets[{j}].", as_config)


def _table_lines(
    settings: Settings, table: Mapping[str, Any], options: Mapping[str, Option], prefix: str, as_config: bool
) -> Iterator[str]:
    for name, value in table.items():
        if name != "subsets":
            # Other tables say otherwise, so that a default must be said as well.
            yield _line(_setting(settings, options[name], value, prefix), as_config, default_acts=True)


def _setting(settings: Settings, option: Option, value: Any, prefix: str = "") -> _Setting:
    """prefix: the dataset or subset whose own value is looked for first."""
    given = given_at(settings, option.name, prefix)
    if given is not None and isinstance(given.value, Secret):
        return _Setting(option.name, given.value, f"{given.source}; not written to files: give it again")
    if given is None or _plain(given.value) != value:
        is_default = value == _plain(option.default)
        return _Setting(option.name, value, _DEFAULT if is_default else "from its folder")
    written = given.label.removeprefix("--")
    spelling = "" if written.rpartition(".")[2] == option.name else f", as {written}"
    replaced = "; its pictures are in the tables below" if option.name in PICTURE_SOURCES else ""
    return _Setting(option.name, value, given.source + spelling + replaced)


def _plain(value: Any) -> Any:
    """As `settings_as_flat_dict` gives it."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.as_posix() if isinstance(value, Path) else value


def _line(setting: _Setting, as_config: bool, default_acts: bool = False) -> str:
    """`name = value  # source`; in a config file, what must not act there is a comment as a whole."""
    is_secret = isinstance(setting.value, Secret)
    if setting.value is None:
        text = f"{setting.name} is unset"
    else:
        text = f"{setting.name} = {setting.value if is_secret else toml_value(setting.value)}"
    acts = (default_acts or setting.source != _DEFAULT) and setting.name not in PICTURE_SOURCES and not is_secret
    if as_config and (not acts or setting.value is None):
        text = f"# {text}"
    return f"{text:<{_COMMENT_COLUMN}}  # {setting.source}"
