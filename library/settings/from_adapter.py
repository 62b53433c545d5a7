"""The settings an adapter was trained with, as its metadata tells them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from library.errors import ModelFileError
from library.options import Option
from library.settings.groups import dataset_options, run_options, shared_dataset_options, subset_options
from library.settings.kohya_metadata import kohya_settings
from library.settings.listing import PICTURE_SOURCES, lift_shared
from library.settings.toml_files import TomlFile
from library.values import is_path

logger = logging.getLogger(__name__)

# Where an adapter file of this project keeps every setting of its run, as JSON.
_OWN_KEY = "ss_anima_settings"


def adapter_settings(path: Path) -> TomlFile:
    """The settings that the adapter's metadata tells, in the form of a settings file; what it cannot know is logged.

    Files of this project tell all of them; Kohya's ss_* keys tell some. A path counts only where it exists on this
    machine, as metadata keeps no folders. Raises ModelFileError for a file that cannot be read or tells nothing.
    """
    metadata = _metadata(path)
    if _OWN_KEY in metadata:
        told, untold = _own_settings(path, metadata[_OWN_KEY])
    elif any(key.startswith("ss_") for key in metadata):
        told, untold = kohya_settings(metadata)
    else:
        raise ModelFileError(f"--from_adapter: {path} tells nothing of its training: it has no ss_ metadata")
    logger.info("settings from %s: %s", path, ", ".join(name for name in told if name != "datasets") or "none")
    if untold:
        logger.warning("%s does not tell these; give them where they matter:\n  %s", path, "\n  ".join(untold))
    return TomlFile(path, told, {})


def _metadata(path: Path) -> Mapping[str, str]:
    if not path.is_file():
        raise ModelFileError(f"--from_adapter: there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"--from_adapter: {path} is not a whole .safetensors file: {error}") from error


def _own_settings(path: Path, text: str) -> tuple[dict[str, Any], list[str]]:
    """What differs from the defaults, as the tables of a settings file, and what could not be known."""
    try:
        flat = json.loads(text)
        datasets = flat.pop("datasets")
        shared, own = lift_shared(datasets)
        untold: list[str] = []
        told = dict(_usable(flat, run_options(), untold))
        told |= _usable(shared, shared_dataset_options(), untold)
        if datasets and not any(_is_missing(subset, subset_options()) for each in own for subset in each["subsets"]):
            told["datasets"] = [_dataset_table(each, untold) for each in own]
        else:
            untold.append("the pictures: set train_data_dir or dataset_config")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileError(f"--from_adapter: {path}: {_OWN_KEY} is damaged: {error!r}") from error
    for name in PICTURE_SOURCES:
        told.pop(name, None)
    return told, untold


def _dataset_table(dataset: Mapping[str, Any], untold: list[str]) -> dict[str, Any]:
    table = dict(_usable({key: value for key, value in dataset.items() if key != "subsets"}, dataset_options(), untold))
    table["subsets"] = [dict(_usable(subset, subset_options(), untold)) for subset in dataset["subsets"]]
    return table


def _usable(values: Mapping[str, Any], options: Mapping[str, Option], untold: list[str]) -> Iterator[tuple[str, Any]]:
    """What this version knows, differs from its default, and is there where it is a path."""
    for name, value in values.items():
        if name not in options:
            untold.append(f"{name} = {value!r}: no setting of this version")
        elif _is_missing({name: value}, options):
            if name not in PICTURE_SOURCES:
                untold.append(f"{name}: it was {value!r}, which is not here")
        elif value is not None and value != _plain_default(options[name]):
            yield name, value


def _is_missing(values: Mapping[str, Any], options: Mapping[str, Option]) -> bool:
    """Whether a file or folder that is read is named but not there."""
    return any(
        isinstance(path, str) and not Path(path).exists()
        for name, value in values.items()
        if name in options and is_path(options[name]) and not options[name].default
        for path in (value if isinstance(value, list) else [value])
    )


def _plain_default(option: Option) -> Any:
    default = option.default
    if isinstance(default, tuple):
        return list(default)
    return str(default) if isinstance(default, Path) else default
