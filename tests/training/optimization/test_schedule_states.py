"""A schedule that goes on where another stopped."""

import logging

import pytest
import torch

from library.training.optimization.optimizers import OptimizerSettings, make_optimizer
from library.training.optimization.schedule_states import load_schedule, schedule_content
from library.training.optimization.schedules import ScheduleSettings, make_schedule


def make(total, rate=0.1, **settings):
    groups = [{"name": "all", "lr": rate, "params": [torch.nn.Parameter(torch.zeros(1))]}]
    optimizer = make_optimizer(OptimizerSettings(learning_rate=rate), groups, torch.device("cpu"))
    return make_schedule(ScheduleSettings(**settings), optimizer, total)


def rates(schedule, steps):
    seen = []
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.step()
        seen.append(schedule.optimizer.param_groups[0]["lr"])
    return seen


SCHEDULES = [
    {},
    {"lr_scheduler": "cosine", "lr_warmup_steps": 3},
    {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 2, "lr_decay_steps": 6},
    {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ("T_max=20",)},
    {"lr_scheduler_type": "OneCycleLR", "lr_scheduler_args": ("max_lr=0.5", "total_steps=21")},
]


@pytest.mark.parametrize("settings", SCHEDULES)
def test_the_rates_go_on_bit_for_bit(settings, caplog):
    caplog.set_level(logging.INFO)
    straight = rates(make(20, **settings), 20)
    first = make(20, **settings)
    rates(first, 9)
    second = make(20, **settings)
    load_schedule(schedule_content(first), second)
    assert second.optimizer.param_groups[0]["lr"] == straight[8]
    assert rates(second, 11) == straight[9:]
    assert caplog.text == ""


@pytest.mark.parametrize("settings", SCHEDULES[:4])
@pytest.mark.parametrize("changed", [{"rate": 0.02}, {"total": 40}])
def test_a_new_rate_or_length_counts_from_the_states_step(settings, changed, caplog):
    caplog.set_level(logging.INFO)
    first = make(20, **settings)
    rates(first, 9)
    arguments = {"total": 20, **changed, **settings}
    second = make(**arguments)
    load_schedule(schedule_content(first), second)
    straight = make(**arguments)
    assert rates(second, 9) == rates(straight, 18)[9:]
    if "rate" in changed:
        assert "lr/all goes on from" in caplog.text and "in the state it was" in caplog.text
