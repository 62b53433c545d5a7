"""What a schedule cannot be combined with, found out before a model is loaded."""

from __future__ import annotations

import torch

from library.errors import SettingError
from library.training.optimization.optimizers import is_schedule_free, sets_own_rate
from library.training.optimization.schedules import (
    ScheduleSettings,
    chosen,
    decay_steps,
    make_schedule,
    schedule_curves,
    unusable,
    warmup_steps,
)


def check_schedule(settings: ScheduleSettings, optimizer: torch.optim.Optimizer, optimizer_type: str) -> None:
    """Raises SettingError where the schedule does not go with the optimizer, or cannot be made."""
    if is_schedule_free(optimizer):
        _check_schedule_free(settings, optimizer, optimizer_type)
    if settings.lr_scheduler == "adafactor" and not sets_own_rate(optimizer) and settings.lr_scheduler_type is None:
        raise SettingError(
            "lr_scheduler: adafactor is for optimizer_type = AdaFactor with optimizer_args relative_step=True, and "
            f"optimizer_type is {optimizer_type}; give another schedule"
        )
    schedule = make_schedule(settings, optimizer, total_steps=1000)
    try:
        optimizer.step()
        schedule.step()
    except TypeError as error:  # such as ReduceLROnPlateau, which wants a loss
        raise SettingError(unusable(settings, optimizer, error)) from error


def _check_schedule_free(settings: ScheduleSettings, optimizer: torch.optim.Optimizer, optimizer_type: str) -> None:
    setting, name = chosen(settings)
    if name != "constant":
        raise SettingError(
            f"{setting}: optimizer_type {optimizer_type} averages weights instead of lowering the rate, and does not "
            f"go with {name}: give lr_scheduler = constant, or another optimizer"
        )
    if settings.lr_warmup_steps:
        instead = " and 'warmup_steps=…' in optimizer_args" if "warmup_steps" in optimizer.param_groups[0] else ""
        raise SettingError(
            f"lr_warmup_steps: optimizer_type {optimizer_type} needs a constant rate: give lr_warmup_steps = 0{instead}"
        )


def check_length(settings: ScheduleSettings, total_steps: int) -> None:
    """Raises SettingError when the schedule does not fit into the run's steps."""
    if settings.lr_scheduler_type is not None:
        _check_class_runs(settings, total_steps)
        return
    warmup, decay = warmup_steps(settings, total_steps), decay_steps(settings, total_steps)
    if warmup and warmup >= total_steps:
        raise SettingError(
            f"lr_warmup_steps: {warmup} steps of rising rate leave none at the full rate, since this run has "
            f"{total_steps} (max_train_steps, max_train_epochs): give fewer, or a fraction of the run such as 0.05"
        )
    if settings.lr_scheduler == "warmup_stable_decay" and warmup + decay > total_steps:
        raise SettingError(
            f"lr_decay_steps: {decay} steps of falling rate after lr_warmup_steps' {warmup} are more than this run's "
            f"{total_steps}: give fewer, or fractions of the run such as 0.1"
        )


def _check_class_runs(settings: ScheduleSettings, total_steps: int) -> None:
    """Some classes, such as OneCycleLR, refuse more steps than they were told of."""
    try:
        schedule_curves(settings, 1.0, {"all": 1.0}, total_steps)
    except ValueError as error:
        raise SettingError(
            f"lr_scheduler_type: {settings.lr_scheduler_type} does not last for this run's {total_steps} steps: {error}"
        ) from error
