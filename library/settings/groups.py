"""All settings of a run: the groups that the components declare, and where each value came from."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.anima_runtime.memory.low_memory import MemorySettings
from library.anima_runtime.objective.losses import LossSettings
from library.anima_runtime.objective.noise import NoiseSettings
from library.anima_runtime.objective.timesteps import TimestepSettings
from library.anima_runtime.sampling.settings import SampleSettings
from library.anima_runtime.settings import ModelSettings
from library.anima_runtime.text.tokenizer_sources import TokenizerSettings
from library.data.settings import DatasetSettings, DataSettings, SubsetSettings
from library.options import Option, Secret, options_of
from library.settings.entries import Given
from library.training.optimization.ema import EmaSettings
from library.training.optimization.optimizers import OptimizerSettings
from library.training.optimization.schedules import ScheduleSettings
from library.training.run import RunSettings
from library.training.saving.metadata import shareable_argument, shareable_path
from library.training.saving.settings import SavingSettings
from library.training.saving.upload import HubSettings
from library.training.speed import SpeedSettings
from library.training.watching.guard import GuardSettings
from library.training.watching.monitor import MonitorSettings
from library.training.watching.trackers import LoggingSettings
from library.training.watching.validation import ValidationSettings
from networks.settings import NetworkSettings


@dataclass(frozen=True)
class Settings:
    """Everything a run was told.

    given: for each option that was set, by its name, the value and its source; options of a dataset table are named
        datasets[0].resolution or datasets[0].subsets[1].num_repeats. What is not in it has its declared default.
    """

    model: ModelSettings
    memory: MemorySettings
    timesteps: TimestepSettings
    noise: NoiseSettings
    loss: LossSettings
    tokenizers: TokenizerSettings
    network: NetworkSettings
    data: DataSettings
    datasets: tuple[DatasetSettings, ...]
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    run: RunSettings
    ema: EmaSettings
    guard: GuardSettings
    monitor: MonitorSettings
    speed: SpeedSettings
    saving: SavingSettings
    hub: HubSettings
    validation: ValidationSettings
    logging: LoggingSettings
    sampling: SampleSettings
    given: Mapping[str, Given]

    @property
    def batch_sizes(self) -> list[int]:
        """Of each dataset."""
        return [dataset.batch_size for dataset in self.datasets]

    @property
    def only_draws(self) -> bool:
        """Whether the run's schedule or timesteps are to be shown, and nothing is to be trained."""
        return self.schedule.show_lr_schedule is not None or self.timesteps.show_timesteps is not None

    @property
    def trains(self) -> bool:
        """Whether this is a run that saves, and not one that only looks at what such a run would be."""
        return not (self.run.dry_run or self.run.preflight or self.only_draws)


def run_groups() -> dict[str, type]:
    """The groups with one value each for the whole run, by their field in Settings."""
    hints = typing.get_type_hints(Settings)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def run_options() -> dict[str, Option]:
    """Options with one value for the whole run, by name."""
    return _by_name(option for group in run_groups().values() for option in options_of(group))


def dataset_options() -> dict[str, Option]:
    """Options of a dataset, by name."""
    return _by_name(options_of(DatasetSettings))


def subset_options() -> dict[str, Option]:
    """Options of a subset, by name."""
    return _by_name(options_of(SubsetSettings))


def shared_dataset_options() -> dict[str, Option]:
    """Dataset and subset options that may stand above their own level: all but what names the pictures."""
    shared = {**dataset_options(), **subset_options()}
    return {name: option for name, option in shared.items() if name not in ("image_dir", "metadata_file")}


def top_level_options() -> dict[str, Option]:
    """What the command line and a settings file accept: the run's options, and fallbacks for every dataset."""
    return {**run_options(), **shared_dataset_options()}


def by_spelling(options: Mapping[str, Option]) -> dict[str, Option]:
    """The options by their names and aliases."""
    return {spelling: option for option in options.values() for spelling in (option.name, *option.aliases)}


def settings_as_flat_dict(
    settings: Settings, path_text: Callable[[Path], str] = str, item_text: Callable[[str], str] = str
) -> dict[str, Any]:
    """Every resolved value by option name, as JSON can hold it; `datasets` is a list of such dicts with `subsets`.

    Secrets are left as if unset. path_text: how a path is written; item_text: a text of a list, such as 'key=value'.
    """
    flat = {
        option.name: _as_json(getattr(getattr(settings, field), option.name), path_text, item_text)
        for field, group in run_groups().items()
        for option in options_of(group)
    }
    flat["datasets"] = [_as_json(dataclasses.asdict(dataset), path_text, item_text) for dataset in settings.datasets]
    return flat


def shareable_settings(settings: Settings) -> dict[str, Any]:
    """`settings_as_flat_dict` for files that others will see: no folders of the machine are in it."""
    return settings_as_flat_dict(settings, shareable_path, shareable_argument)


def _as_json(value: Any, path_text: Callable[[Path], str], item_text: Callable[[str], str]) -> Any:
    if isinstance(value, Path):
        return path_text(value)
    if isinstance(value, Secret):
        return None
    if isinstance(value, tuple | list):
        return [item_text(item) if isinstance(item, str) else _as_json(item, path_text, item_text) for item in value]
    if isinstance(value, dict):
        return {key: _as_json(item, path_text, item_text) for key, item in value.items()}
    return value


def _by_name(options: Iterable[Option]) -> dict[str, Option]:
    return {option.name: option for option in options}
