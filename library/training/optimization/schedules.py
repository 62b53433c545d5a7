"""Learning-rate schedules by name."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.errors import SettingError
from library.options import option
from library.plots import save_line_plot
from library.training.optimization.optimizers import named_parameters, sets_own_rate, typed_arguments

logger = logging.getLogger(__name__)

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "inverse_sqrt",
    "adafactor",
)


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate changes over the run."""

    lr_scheduler: str = option(
        "constant",
        "Shape of the learning rate over the run. cosine ends gently; warmup_stable_decay stays at the rate and falls "
        "at the end; adafactor is for AdaFactor with relative_step, which sets the rate itself.",
        choices=SCHEDULES,
    )
    lr_warmup_steps: int | float = option(
        0, "Steps of rising rate at the start; below 1, a fraction of the run. 0.05 is usual for high rates."
    )
    lr_decay_steps: int | float | None = option(
        None, "warmup_stable_decay: steps of falling rate at the end; below 1, a fraction of the run. Unset: 0.1."
    )
    lr_scheduler_num_cycles: float | None = option(
        None,
        "Cosine waves. cosine, cosine_with_min_lr, warmup_stable_decay: 0.5 (unset) falls once, from the rate to the "
        "end; 1 does the same, since other programs write it into every file; "
        "cosine_with_restarts: the number of falls, unset 1.",
    )
    lr_scheduler_power: float = option(1.0, "polynomial: 1 falls in a straight line, 2 faster at first.")
    lr_scheduler_min_lr_ratio: float = option(
        0.0, "cosine_with_min_lr, warmup_stable_decay: lowest rate as a share of learning_rate."
    )
    lr_scheduler_timescale: int | None = option(
        None,
        "inverse_sqrt: steps after which the rate is down to 71 %, and after three times as many to half. "
        "Unset: lr_warmup_steps, or 10000 without.",
    )
    lr_scheduler_type: str | None = option(
        None, "A schedule class instead of lr_scheduler: package.module.Class, or one of torch.optim.lr_scheduler."
    )
    lr_scheduler_args: tuple[str, ...] = option(
        (), "Further arguments of the schedule, each 'key=value', such as 'decay_type=linear' or 'T_max=1000'."
    )
    show_lr_schedule: Path | None = option(
        None, "Only draw this run's learning rate into a picture (FILE.png), and stop before models are loaded."
    )


def warmup_steps(settings: ScheduleSettings, total_steps: int) -> int:
    """lr_warmup_steps in steps."""
    return _in_steps(settings.lr_warmup_steps, total_steps)


def decay_steps(settings: ScheduleSettings, total_steps: int) -> int:
    """lr_decay_steps in steps."""
    return _in_steps(0.1 if settings.lr_decay_steps is None else settings.lr_decay_steps, total_steps)


def _in_steps(value: float, total_steps: int) -> int:
    """A value below 1 is a fraction of the run."""
    return round(value * total_steps) if 0 < value < 1 else int(value)


def make_schedule(settings: ScheduleSettings, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
    """The schedule, to be stepped once per optimizer step.

    Raises SettingError where it cannot be made with its arguments and this learning rate.
    """
    if sets_own_rate(optimizer):
        return _constant(optimizer)
    if settings.lr_scheduler_type is None:
        make, arguments = _named_schedule(settings, total_steps)
    else:
        make, arguments = _schedule_class(settings.lr_scheduler_type), {}
    given = _given_arguments(settings, make)
    if "min_lr" in given:
        arguments.pop("min_lr_rate", None)
    try:
        return make(optimizer, **{**arguments, **given})
    except Exception as error:  # each class has exceptions of its own for values that it cannot use
        raise SettingError(unusable(settings, optimizer, error)) from error


def _named_schedule(settings: ScheduleSettings, total_steps: int) -> tuple[Callable[..., LRScheduler], dict[str, Any]]:
    """The function for lr_scheduler, transformers' but for constant, and what of the settings it takes."""
    name, cycles = settings.lr_scheduler, settings.lr_scheduler_num_cycles
    warmup = warmup_steps(settings, total_steps)
    if name == "constant":
        if not warmup:
            return _constant, {}
        name = "constant_with_warmup"
    if name == "cosine_with_restarts":
        waves = 1 if cycles is None else cycles
    else:
        waves = 0.5 if cycles in (None, 1) else cycles
    make = _of_transformers(name)
    arguments = {
        "num_warmup_steps": warmup,
        "num_decay_steps": decay_steps(settings, total_steps),
        "num_training_steps": total_steps,
        "num_cycles": waves,
        "power": settings.lr_scheduler_power,
        "min_lr_rate": settings.lr_scheduler_min_lr_ratio,
        "min_lr_ratio": settings.lr_scheduler_min_lr_ratio,
        "timescale": settings.lr_scheduler_timescale,
    }
    return make, {key: value for key, value in arguments.items() if key in named_parameters(make)}


def _schedule_class(name: str) -> type[LRScheduler]:
    module, _, class_name = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module or "torch.optim.lr_scheduler"), class_name, None)
    except (ImportError, ValueError) as error:
        package = name.partition(".")[0]
        raise SettingError(f"lr_scheduler_type: {name} needs a package ({error}): pip install {package}") from error
    if not (inspect.isclass(cls) and issubclass(cls, LRScheduler)):
        raise SettingError(f"lr_scheduler_type: {name} is no schedule class; give package.module.Class")
    return cls


def _given_arguments(settings: ScheduleSettings, make: Callable[..., LRScheduler]) -> dict[str, Any]:
    """lr_scheduler_args, typed. Raises SettingError for one that the schedule does not take."""
    given = typed_arguments("lr_scheduler_args", settings.lr_scheduler_args)
    own = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    known = [name for name in named_parameters(make) if name not in own]
    for name in given:
        if name not in known:
            listed = ", ".join(known) or "nothing"
            raise SettingError(f"lr_scheduler_args: {chosen(settings)[1]} takes no {name!r}; it takes {listed}")
    return given


def unusable(settings: ScheduleSettings, optimizer: torch.optim.Optimizer, error: Exception) -> str:
    """The message for a schedule that raised `error`."""
    setting, name = chosen(settings)
    rate, words = optimizer.defaults["lr"], ", ".join(settings.lr_scheduler_args) or "none"
    return f"{setting}: {name} cannot be used with learning_rate {rate:g} and lr_scheduler_args {words}: {error}"


def chosen(settings: ScheduleSettings) -> tuple[str, str]:
    """The setting that chooses the schedule, and what it says."""
    if settings.lr_scheduler_type is not None:
        return "lr_scheduler_type", settings.lr_scheduler_type
    return "lr_scheduler", settings.lr_scheduler


def _of_transformers(name: str) -> Callable[..., LRScheduler]:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION  # 2 to 5 s, of which `constant` needs nothing

    return {kind.value: make for kind, make in TYPE_TO_SCHEDULER_FUNCTION.items()}[name]


def _constant(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda _: 1.0)


def schedule_curves(
    settings: ScheduleSettings, learning_rate: float, rates: Mapping[str, float], total_steps: int
) -> dict[str, list[tuple[int, float]]]:
    """(step, learning rate) of every step of a run, for each parameter group; rates: their rates by name."""
    groups = [{"name": name, "lr": rate, "params": [nn.Parameter(torch.zeros(1))]} for name, rate in rates.items()]
    optimizer = torch.optim.SGD(groups, lr=learning_rate)
    schedule = make_schedule(settings, optimizer, total_steps)
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in rates}
    for step in range(total_steps):
        for group in optimizer.param_groups:
            curves[group["name"]].append((step, group["lr"]))
        optimizer.step()
        schedule.step()
    return curves


def draw_schedule(
    settings: ScheduleSettings, learning_rate: float, rates: Mapping[str, float], total_steps: int
) -> None:
    """Draws `schedule_curves` into show_lr_schedule's picture."""
    path = settings.show_lr_schedule
    curves = schedule_curves(settings, learning_rate, rates, total_steps)
    save_line_plot(path, f"Learning rate: {chosen(settings)[1]}, {total_steps} steps", "step", curves)
    logger.info("learning rate of the run: %s", path.resolve())
