"""Learning rates over a run, against their formulas."""

import math

import pytest
import torch

from library.errors import SettingError
from library.training.optimization.schedules import (
    SCHEDULES,
    ScheduleSettings,
    make_schedule,
    schedule_curves,
    warmup_steps,
)

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


@pytest.mark.parametrize("cycles", [0.5, 1])
def test_other_programs_default_of_one_cycle_falls_once_too(cycles):
    assert rates(lr_scheduler="cosine", lr_scheduler_num_cycles=cycles) == rates(lr_scheduler="cosine")


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


def test_warmup_stable_decay_holds_the_rate_and_falls_to_the_minimum():
    seen = rates(
        lr_scheduler="warmup_stable_decay", lr_warmup_steps=10, lr_decay_steps=0.25, lr_scheduler_min_lr_ratio=0.1
    )
    # transformers' warmup starts at the minimum here
    assert seen[:11] == pytest.approx([2 * (0.1 + 0.9 * k / 10) for k in range(11)])
    assert seen[10:31] == [2.0] * 21
    assert seen[30:] == pytest.approx([2 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 10)) / 2) for k in range(11)])


def test_the_decay_is_a_tenth_of_the_run_if_nothing_is_said():
    seen = rates(lr_scheduler="warmup_stable_decay")
    assert seen[36] == 2.0 > seen[37]
    assert seen[-1] == 0


def test_inverse_sqrt_obeys_the_timescale():
    seen = rates(lr_scheduler="inverse_sqrt", lr_warmup_steps=4, lr_scheduler_timescale=9)
    assert seen[4:] == pytest.approx([2 / math.sqrt(1 + k / 9) for k in range(STEPS - 3)])
    without = rates(lr_scheduler="inverse_sqrt", lr_warmup_steps=4)
    assert without[4:] == pytest.approx([2 / math.sqrt(1 + k / 4) for k in range(STEPS - 3)])


def test_further_arguments_reach_the_schedule():
    seen = rates(lr_scheduler="warmup_stable_decay", lr_decay_steps=20, lr_scheduler_args=("decay_type=linear",))
    assert seen[20:] == pytest.approx([2 * (1 - k / 20) for k in range(21)])
    assert rates(lr_scheduler="cosine_with_min_lr", lr_scheduler_args=("min_lr=0.5",))[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["StepLR", "torch.optim.lr_scheduler.StepLR"])
def test_a_class_takes_its_arguments_from_lr_scheduler_args(name):
    seen = rates(lr_scheduler="cosine", lr_scheduler_type=name, lr_scheduler_args=("step_size=10", "gamma=0.5"))
    assert seen == [2 * 0.5 ** (k // 10) for k in range(STEPS + 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_type": "StepLRR"}, "lr_scheduler_type: StepLRR is no schedule class"),
        ({"lr_scheduler_type": "no_such_package.A"}, "pip install no_such_package"),
        ({"lr_scheduler_type": "StepLR"}, "lr_scheduler_type: StepLR cannot be used with learning_rate 2 and"),
        (
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("size=1",)},
            "lr_scheduler_args: StepLR takes no 'size'; it takes step_size, gamma",
        ),
        ({"lr_scheduler_args": ("gamma=1",)}, "lr_scheduler_args: constant takes no 'gamma'; it takes nothing"),
        (
            {"lr_scheduler": "polynomial", "lr_scheduler_args": ("lr_end=3",)},
            "lr_scheduler: polynomial cannot be used with learning_rate 2 and lr_scheduler_args lr_end=3",
        ),
    ],
)
def test_what_cannot_be_used_is_named(settings, message):
    with pytest.raises(SettingError) as error:
        rates(**settings)
    assert message in str(error.value)


def test_curves_show_each_groups_rate_at_each_step():
    settings = ScheduleSettings(lr_scheduler="linear", lr_warmup_steps=2)
    curves = schedule_curves(settings, 1.0, {"transformer": 1.0, "llm_adapter": 0.5}, 6)
    expected = [0, 0.5, 1, 0.75, 0.5, 0.25]
    assert [step for step, _ in curves["transformer"]] == list(range(6))
    assert [rate for _, rate in curves["transformer"]] == pytest.approx(expected)
    assert [rate for _, rate in curves["llm_adapter"]] == pytest.approx([0.5 * rate for rate in expected])


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "adafactor"])
def test_warmup_rises_evenly_in_steps_or_as_a_fraction(name):
    for warmup in (8, 0.2):
        assert rates(lr_scheduler=name, lr_warmup_steps=warmup)[:9] == pytest.approx([k / 4 for k in range(9)])


def test_warmup_of_one_is_a_step():
    assert warmup_steps(ScheduleSettings(lr_warmup_steps=1), 100) == 1
    assert warmup_steps(ScheduleSettings(lr_warmup_steps=0.05), 100) == 5
