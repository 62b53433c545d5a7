"""Learning-rate schedules by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler

from library.options import option

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "cosine_with_min_lr",
)


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate changes over the run."""

    lr_scheduler: str = option("constant", "Shape of the learning rate over the run.", choices=SCHEDULES)
    lr_warmup_steps: int | float = option(0, "Steps of rising rate at the start; below 1, a fraction of the run.")
    lr_scheduler_num_cycles: float | None = option(
        None,
        "Cosine waves. cosine and cosine_with_min_lr: 0.5 (unset) falls once, from the rate to the end; "
        "cosine_with_restarts: the number of falls, unset 1.",
    )
    lr_scheduler_power: float = option(1.0, "Exponent of the polynomial schedule.")
    lr_scheduler_min_lr_ratio: float = option(0.0, "cosine_with_min_lr: lowest rate as a share of learning_rate.")


def warmup_steps(settings: ScheduleSettings, total_steps: int) -> int:
    """lr_warmup_steps in steps: a value below 1 is a fraction of the run."""
    if 0 < settings.lr_warmup_steps < 1:
        return round(settings.lr_warmup_steps * total_steps)
    return int(settings.lr_warmup_steps)


def make_schedule(
    settings: ScheduleSettings, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule, to be stepped once per optimizer step."""
    name = settings.lr_scheduler
    warmup = warmup_steps(settings, total_steps)
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=_specific_arguments(name, settings),
    )


def _specific_arguments(name: str, settings: ScheduleSettings) -> dict[str, Any]:
    cycles = settings.lr_scheduler_num_cycles
    waves = 0.5 if cycles is None else cycles
    if name == "cosine":
        return {"num_cycles": waves}
    if name == "cosine_with_min_lr":
        return {"num_cycles": waves, "min_lr_rate": settings.lr_scheduler_min_lr_ratio}
    if name == "cosine_with_restarts":
        return {"num_cycles": 1 if cycles is None else cycles}
    if name == "polynomial":
        return {"power": settings.lr_scheduler_power}
    return {}
