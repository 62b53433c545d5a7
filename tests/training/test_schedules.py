"""Learning rates over a run, against their formulas."""

import math

import pytest
import torch

from library.training.schedules import SCHEDULES, ScheduleSettings, make_schedule, warmup_steps

STEPS = 40


def rates(**settings) -> list[float]:
    """The rate used by each step of the run, then the one after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    schedule = make_schedule(ScheduleSettings(**settings), optimizer, STEPS)
    seen = []
    for _ in range(STEPS):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [*seen, schedule.get_last_lr()[0]]


def test_constant_and_linear():
    assert rates(lr_scheduler="constant") == [2.0] * (STEPS + 1)
    assert rates(lr_scheduler="linear") == pytest.approx([2.0 * (1 - k / STEPS) for k in range(STEPS + 1)])


def test_cosine_falls_to_zero_once():
    expected = [1 + math.cos(math.pi * k / STEPS) for k in range(STEPS + 1)]
    assert rates(lr_scheduler="cosine") == pytest.approx(expected, abs=1e-9)


def test_cosine_obeys_the_number_of_cycles():
    expected = [1 + math.cos(2 * math.pi * 1.5 * k / STEPS) for k in range(STEPS + 1)]
    assert rates(lr_scheduler="cosine", lr_scheduler_num_cycles=1.5) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("cycles", [None, 0.5])
def test_half_a_cosine_with_a_minimum_ends_at_the_minimum(cycles):
    seen = rates(lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.1, lr_scheduler_num_cycles=cycles)
    assert seen[0] == 2.0
    assert seen[-1] == pytest.approx(0.2)
    assert seen[STEPS // 2] == pytest.approx(1.1)


def test_restarts_count_whole_falls():
    seen = rates(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=2)
    assert seen[0] == seen[STEPS // 2] == 2.0
    assert seen[STEPS // 4] == pytest.approx(1.0)
    assert seen[-1] == 0.0


def test_restarts_may_end_within_a_fall():
    seen = rates(lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=2.5)
    expected = [1 + math.cos(math.pi * (2.5 * k / STEPS % 1)) for k in range(STEPS)]
    assert seen[:-1] == pytest.approx(expected)


def test_polynomial_obeys_the_power():
    """transformers' polynomial ends at 1e-7."""
    expected = [(2 - 1e-7) * (1 - k / STEPS) ** 3 + 1e-7 for k in range(STEPS + 1)]
    assert rates(lr_scheduler="polynomial", lr_scheduler_power=3) == pytest.approx(expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_rises_evenly_in_steps_or_as_a_fraction(name):
    for warmup in (8, 0.2):
        assert rates(lr_scheduler=name, lr_warmup_steps=warmup)[:9] == pytest.approx([k / 4 for k in range(9)])


def test_warmup_of_one_is_a_step():
    assert warmup_steps(ScheduleSettings(lr_warmup_steps=1), 100) == 1
    assert warmup_steps(ScheduleSettings(lr_warmup_steps=0.05), 100) == 5
