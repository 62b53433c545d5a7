"""What is drawn and judged at log points, and when."""

from types import SimpleNamespace

import pytest
import torch

from library.training.run import RunState
from library.training.step_records import StepRecords
from library.training.watching.guard import GuardSettings
from library.training.watching.log_points import LogPoints, judges_at_once
from library.training.watching.meter import Meter
from library.training.watching.monitor import Monitor, MonitorSettings

CPU = torch.device("cpu")


@pytest.fixture
def case():
    """Log points with the real parts, but for a tracker and a guard that keep what they are given."""
    drawn, judged = [], []
    tracker = SimpleNamespace(log=lambda values, step: drawn.append((step, values)), look=lambda *_: None)
    check = lambda records, state: judged.append([record.step for record in records])  # noqa: E731
    guard = SimpleNamespace(leaves_out=True, check=check)
    records, meter = StepRecords(lambda own: own), Meter()
    monitor = Monitor(MonitorSettings(), torch.nn.Linear(2, 2), CPU)
    points = LogPoints(records, meter, monitor, guard, tracker, lambda own: own)

    def step(loss):
        records.close_step(torch.tensor(loss), torch.tensor(0.5))

    return SimpleNamespace(points=points, step=step, drawn=drawn, judged=judged)


def test_a_log_point_is_drawn_as_it_was_when_it_was_reached(case):
    case.step(4.0)
    case.step(2.0)
    case.points.reach(2, {"lr/all": 0.1})
    case.step(9.0)
    assert case.drawn == []
    case.points.look(RunState(step=3))
    ((step, values),) = case.drawn
    assert (step, values["loss/current"], values["loss/average"], values["lr/all"]) == (2, 2.0, 3.0, 0.1)
    assert values["norm/gradient"] == 0.5 and values["norm/weights"] > 0
    case.points.reach(3, {"lr/all": 0.2})
    case.points.look(RunState(step=3))
    assert case.drawn[1][1]["loss/current"] == 9.0
    assert case.judged == [[1, 2], [3]]


@pytest.mark.parametrize("looks", [False, True])
def test_a_log_point_that_is_reached_again_is_one(case, looks):
    case.step(4.0)
    case.points.reach(1, {})
    if looks:
        case.points.look(RunState(step=1))
    case.points.reach(1, {})
    case.points.look(RunState(step=1))
    assert [step for step, _ in case.drawn] == [1] and case.judged == [[1]]


def test_a_state_has_the_numbers_of_all_its_steps_whether_or_not_they_were_read(case):
    """One log point was looked at, one was reached, and behind that there are steps."""
    nan = float("nan")
    case.step(1.0)
    case.points.reach(1, {})
    case.points.look(RunState(step=1))
    for loss in (nan, nan):
        case.step(loss)
    case.points.reach(3, {})
    case.step(5.0)
    own = RunState(step=4, skipped_steps=1)
    completed = case.points.state_by_now(own)
    case.step(nan)
    case.points.look(own)
    state = completed()
    assert state == completed()
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (4, 3, 0)
    assert state.averages == {"average": 3.0, "losses_read": 2, "epoch_sum": 6.0, "epoch_steps": 2}
    assert own.averages == {}


def test_without_a_log_point_there_is_nothing_to_look_at(case):
    case.step(1.0)
    case.points.look(RunState(step=1))
    assert case.drawn == [] and case.judged == []


@pytest.mark.parametrize(
    ("policy", "on_nonfinite", "expected"),
    [("warn", "skip", False), ("warn", "warn", False), ("raise", "skip", True), ("warn", "raise", True),
     ("warn", "rollback", True)],
)  # fmt: skip
def test_what_may_end_the_run_or_put_it_back_is_judged_at_once(policy, on_nonfinite, expected):
    monitor = MonitorSettings(anima_monitor_alert_policy=policy)
    assert judges_at_once(monitor, GuardSettings(on_nonfinite=on_nonfinite)) is expected
