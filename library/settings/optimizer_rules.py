"""Rules of the optimizer and its learning rate: what cannot be combined, what does nothing, and what may surprise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch

from library.errors import SettingError
from library.settings.groups import Settings
from library.settings.origins import origin, placed
from library.training.optimization.optimizers import check_optimizer, finds_own_rate, is_schedule_free, sets_own_rate
from library.training.optimization.schedule_checks import check_schedule

logger = logging.getLogger(__name__)

_RATES = ("learning_rate", "unet_lr", "llm_adapter_lr", "text_encoder_lr")
# Schedules that a setting is for.
_USERS = {
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_num_cycles": ("cosine", "cosine_with_min_lr", "warmup_stable_decay", "cosine_with_restarts"),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
    "lr_scheduler_timescale": ("inverse_sqrt",),
}


def optimizer_problems(settings: Settings) -> Iterator[str]:
    """The optimizer exists, takes its arguments, and goes with its schedule and the other settings."""
    name = settings.optimizer.optimizer_type
    # A rate below 0 is out of range, and told so.
    usable = replace(settings.optimizer, learning_rate=max(0.0, settings.optimizer.learning_rate))
    try:
        optimizer = check_optimizer(usable)
    except SettingError as error:
        yield placed(settings, str(error))
        return
    if is_schedule_free(optimizer) and settings.network.scale_weight_norms is not None:
        yield (
            f"{origin(settings, 'scale_weight_norms')}: optimizer_type {name} saves other weights than those it moves, "
            "so their norms cannot be limited: drop scale_weight_norms, or give another optimizer"
        )
    if sets_own_rate(optimizer) and settings.schedule.show_lr_schedule is not None:
        yield f"{origin(settings, 'show_lr_schedule')}: {name} takes its rate from the weights: nothing can be drawn"
    if sets_own_rate(optimizer) and settings.guard.on_nonfinite == "rollback":
        yield (
            f"{origin(settings, 'on_nonfinite')}: rollback lowers the rate, and {name} takes its own from the weights: "
            "add relative_step=False to optimizer_args, or give on_nonfinite = skip"
        )
    try:
        check_schedule(settings.schedule, optimizer, name)
    except SettingError as error:
        yield placed(settings, str(error))


def warn_of_rates(settings: Settings) -> None:
    """Warns of learning rates that are allowed, but hardly meant."""
    _warn_of_rising_rate(settings)
    optimizer = _working_optimizer(settings)
    if optimizer is None or not finds_own_rate(optimizer):
        return
    rates = {"learning_rate": settings.optimizer.learning_rate}
    rates |= {name: getattr(settings.network, name) for name in _RATES if name != "learning_rate"}
    for name, rate in rates.items():
        if rate is not None and 0 < rate < 0.1:
            logger.warning(
                "%s: %s finds the learning rate itself and multiplies it by this, which is %g: give 1",
                origin(settings, name), settings.optimizer.optimizer_type, rate,
            )  # fmt: skip


def _warn_of_rising_rate(settings: Settings) -> None:
    """Other trainers ignore the number of waves where one cosine falls, so their files may hold any."""
    schedule, waves = settings.schedule, settings.schedule.lr_scheduler_num_cycles
    falls = schedule.lr_scheduler in ("cosine", "cosine_with_min_lr", "warmup_stable_decay")
    if falls and schedule.lr_scheduler_type is None and waves not in (None, 1) and waves % 1 != 0.5:
        name = origin(settings, "lr_scheduler_num_cycles")
        logger.warning("%s: after %g waves the learning rate ends above its lowest; 0.5 falls once", name, waves)


def optimizer_without_effect(settings: Settings) -> Iterator[tuple[str, str]]:
    """Settings that do nothing beside the others, as (name, why)."""
    schedule, optimizer = settings.schedule, _working_optimizer(settings)
    if optimizer is not None and sets_own_rate(optimizer):
        reason = (
            f"{settings.optimizer.optimizer_type} sets its own rate; optimizer_args relative_step=False uses "
            "learning_rate and lr_scheduler"
        )
        names = [*_RATES, *(name for name in vars(schedule) if name != "show_lr_schedule")]
        if schedule.lr_scheduler == "adafactor":  # which says just that
            names.remove("lr_scheduler")
        yield from ((name, reason) for name in names)
    elif schedule.lr_scheduler_type is not None:
        for name in ("lr_scheduler", "lr_warmup_steps", *_USERS):
            yield name, f"lr_scheduler_type is {schedule.lr_scheduler_type}, and wins"
    else:
        for name, users in _USERS.items():
            if schedule.lr_scheduler not in users:
                yield name, f"it is for lr_scheduler {' and '.join(users)}, and lr_scheduler is {schedule.lr_scheduler}"


def _working_optimizer(settings: Settings) -> torch.optim.Optimizer | None:
    """One like the run's; None where it cannot be made, which `optimizer_problems` tells."""
    try:
        return check_optimizer(settings.optimizer)
    except SettingError:
        return None
