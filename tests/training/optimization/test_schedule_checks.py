"""Schedules that do not go with the optimizer or the length of the run."""

import pytest

from library.errors import SettingError
from library.training.optimization.optimizers import OptimizerSettings, check_optimizer
from library.training.optimization.schedule_checks import check_length, check_schedule
from library.training.optimization.schedules import ScheduleSettings


def problem(optimizer="AdamW", optimizer_args=(), learning_rate=1e-4, **schedule) -> str:
    made = check_optimizer(
        OptimizerSettings(optimizer_type=optimizer, optimizer_args=optimizer_args, learning_rate=learning_rate)
    )
    try:
        check_schedule(ScheduleSettings(**schedule), made, optimizer)
    except SettingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_schedule_free_optimizers_need_a_constant_rate(name):
    pytest.importorskip("schedulefree")
    assert problem(name) == ""
    message = problem(name, lr_scheduler="cosine")
    assert message.startswith(f"lr_scheduler: optimizer_type {name} averages weights")
    assert problem(name, lr_scheduler_type="StepLR").startswith(f"lr_scheduler_type: optimizer_type {name}")
    message = problem(name, lr_warmup_steps=10)
    assert message.startswith(f"lr_warmup_steps: optimizer_type {name} needs a constant rate")
    assert ("'warmup_steps=…' in optimizer_args" in message) == (name != "RAdamScheduleFree")


def test_without_averaging_the_same_optimizer_takes_a_schedule():
    pytest.importorskip("prodigyplus")
    assert "averages weights" in problem("ProdigyPlusScheduleFree", lr_scheduler="cosine")
    assert problem("ProdigyPlusScheduleFree", ("use_schedulefree=False",), lr_scheduler="cosine") == ""


def test_the_adafactor_schedule_is_for_adafactor_alone():
    assert problem("AdaFactor", lr_scheduler="adafactor") == ""
    assert "optimizer_type is AdamW" in problem(lr_scheduler="adafactor")
    assert problem("AdaFactor", ("relative_step=False",), lr_scheduler="adafactor").startswith("lr_scheduler:")
    assert problem("AdaFactor", ("relative_step=False",), lr_scheduler="cosine") == ""


def test_polynomial_needs_a_rate_above_its_end():
    message = problem(learning_rate=1e-8, lr_scheduler="polynomial")
    assert message.startswith("lr_scheduler: polynomial cannot be used with learning_rate 1e-08")
    assert "lr_end" in message
    assert problem(learning_rate=1e-6, lr_scheduler="polynomial") == ""


def test_a_class_that_wants_to_see_the_loss_is_refused():
    assert problem(lr_scheduler_type="ReduceLROnPlateau").startswith("lr_scheduler_type: ReduceLROnPlateau cannot")


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({"lr_warmup_steps": 100}, 100, "lr_warmup_steps: 100 steps of rising rate leave none"),
        ({"lr_warmup_steps": 100}, 101, None),
        ({"lr_warmup_steps": 0.5}, 10, None),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 50, "lr_decay_steps": 51},
            100,
            "lr_decay_steps: 51 steps of falling rate after lr_warmup_steps' 50 are more than this run's 100",
        ),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 50, "lr_decay_steps": 50}, 100, None),
        ({"lr_warmup_steps": 50, "lr_decay_steps": 51}, 100, None),
        (
            {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=1", "total_steps=50")},
            100,
            "lr_scheduler_type: OneCycleLR does not last for this run's 100 steps",
        ),
        ({"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=1", "total_steps=101")}, 100, None),
    ],
)
def test_the_schedule_fits_into_the_run(settings, steps, message):
    if message is None:
        check_length(ScheduleSettings(**settings), steps)
        return
    with pytest.raises(SettingError) as error:
        check_length(ScheduleSettings(**settings), steps)
    assert message in str(error.value)
