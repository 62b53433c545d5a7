"""What becomes of a step whose numbers are not finite, policy by policy."""

import copy
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from library.training.optimization.ema import AdapterEma, EmaSettings
from library.training.optimization.optimizers import OptimizerSettings, make_optimizer
from library.training.run import RunState
from library.training.step_records import SampleLoss, StepRecord
from library.training.watching.guard import (
    MOST_ROLLBACKS,
    MOST_SKIPPED,
    Guard,
    NonFiniteError,
    can_be_told,
    lowered_rates,
)

NAN, INF = float("nan"), float("inf")
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "fused adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True, amsgrad=True),
    "fused sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
}


class Run:
    """A weight of three numbers, trained by gradients that are given."""

    def __init__(self, policy: str, optimizer: str = "adamw", fp16: bool = False) -> None:
        self.network = nn.Linear(3, 1, bias=False)
        nn.init.ones_(self.network.weight)
        self.optimizer = OPTIMIZERS[optimizer](self.network.parameters())
        self.scaler = torch.amp.GradScaler("cpu", enabled=fp16)
        self.guard = Guard(policy, self.network, self.optimizer, self.scaler)
        self.state = RunState()

    def step(self, gradient: float, loss: float = 1.0) -> StepRecord:
        self.network.weight.grad = torch.full((1, 3), gradient)
        self.guard.step(torch.tensor(loss), self.network.weight.grad.norm(), self.state)
        self.state.step += 1
        return record(self.state.step, loss, gradient)

    def weight(self) -> float:
        return self.network.weight[0, 0].item()

    def content(self) -> dict:
        return copy.deepcopy(
            {"weight": self.network.weight.detach(), **self.optimizer.state_dict()["state"].get(0, {})}
        )


def record(step: int, loss: float = 1.0, norm: float = 1.0) -> StepRecord:
    samples = (SampleLoss(Path("a.png"), 0.5, loss), SampleLoss(Path("b.png"), 0.5, 1.0))
    return StepRecord(step, loss, norm, samples)


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[name])), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("gradient", "loss"), [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, -INF)])
def test_weights_and_optimizer_stay_bit_for_bit(optimizer, gradient, loss):
    run = Run("skip", optimizer)
    run.step(1.0)
    before = run.content()
    run.step(gradient, loss)
    assert_same(before, run.content())
    run.step(2.0)
    straight = Run("skip", optimizer)
    straight.step(1.0)
    straight.step(2.0)
    assert_same(straight.content(), run.content())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_begins_with_a_step_left_out_goes_on_as_one_without_it(optimizer):
    run, straight = Run("skip", optimizer), Run("skip", optimizer)
    run.step(NAN)
    for each in (run, straight):
        each.step(1.0)
        each.step(0.5)
    assert_same(straight.content(), run.content())


def test_only_fused_adam_is_told_on_the_device():
    told = {name: can_be_told(make([nn.Parameter(torch.ones(1))])) for name, make in OPTIMIZERS.items()}
    assert told == {"adamw": False, "fused adamw": True, "fused adam": True, "fused sgd": False}


class OnGpu:
    """A network whose only parameter says that it is on a GPU."""

    def parameters(self):
        return iter([SimpleNamespace(device=torch.device("cuda"))])


@pytest.mark.parametrize("policy", ["skip", "warn", "raise"])
@pytest.mark.parametrize(
    ("name", "dependent", "reason"),
    [
        ("adamw", None, "AdamW cannot be told there to leave a step out"),
        ("fused sgd", "scale_weight_norms", "SGD cannot be told there to leave a step out"),
        ("fused adamw", "scale_weight_norms", "scale_weight_norms acts on steps that were taken alone"),
        ("fused adamw", None, None),
    ],
)
def test_that_steps_wait_for_the_gpu_is_told_with_the_reason(policy, name, dependent, reason, caplog):
    caplog.set_level(logging.INFO)
    optimizer = OPTIMIZERS[name]([nn.Parameter(torch.ones(1))])
    Guard(policy, OnGpu(), optimizer, torch.amp.GradScaler("cpu", enabled=False), dependent)
    message = f"on_nonfinite: each step waits for the GPU, as {reason}"
    assert caplog.messages == ([message] if reason and policy != "warn" else [])


def test_the_verdict_says_whether_the_weights_moved():
    run = Run("skip")
    assert run.guard.step(torch.tensor(1.0), torch.tensor(1.0), run.state).item() is True
    assert run.guard.step(torch.tensor(1.0), torch.tensor(INF), run.state).item() is False


def test_skipped_steps_are_counted_and_their_pictures_named(caplog):
    run = Run("skip")
    run.guard.check([record(1), record(2, NAN), record(3, 1.0, INF)], run.state)
    assert (run.state.skipped_steps, run.state.skipped_in_a_row) == (2, 2)
    loss, gradients = caplog.messages
    assert loss == "step 2: the loss is not finite (NaN or infinite); pictures: a.png: left out"
    assert gradients == "step 3: the gradients are not finite (NaN or infinite); pictures: a.png, b.png: left out"
    run.guard.check([record(4)], run.state)
    assert (run.state.skipped_steps, run.state.skipped_in_a_row) == (2, 0)


@pytest.mark.parametrize("policy", ["skip", "warn"])
def test_too_many_in_a_row_end_the_run_across_log_points(policy):
    run = Run(policy)
    run.guard.check([record(step, NAN) for step in range(1, MOST_SKIPPED)], run.state)
    with pytest.raises(NonFiniteError, match=r"20 steps in a row are not finite.*a\.png.*lower learning_rate"):
        run.guard.check([record(MOST_SKIPPED, NAN)], run.state)


def test_warn_takes_the_step(caplog):
    run = Run("warn")
    run.guard.check([run.step(NAN)], run.state)
    assert math.isnan(run.weight())
    assert run.state.skipped_steps == 0
    assert "taken nonetheless" in caplog.text


def test_raise_leaves_the_step_out_and_names_the_pictures():
    run = Run("raise")
    with pytest.raises(NonFiniteError, match=r"step 1: the gradients are not finite.*a\.png, b\.png.*was left out"):
        run.guard.check([run.step(NAN)], run.state)
    assert run.weight() == 1.0
    assert run.state.skipped_steps == 1


@pytest.mark.parametrize("policy", ["skip", "warn", "raise", "rollback"])
def test_fp16_finding_its_loss_scale_is_no_fault(policy, caplog):
    caplog.set_level(logging.INFO)
    run = Run(policy, fp16=True)
    before = run.content()
    run.guard.check([run.step(INF)], run.state)
    assert_same(before, run.content())
    assert (run.state.skipped_steps, run.state.rollbacks) == (1, 0)
    assert [message.levelname for message in caplog.records] == ["INFO"]


def test_rollback_returns_to_the_last_good_weights_and_halves_the_rate(caplog):
    run = Run("rollback")
    run.guard.check([run.step(1.0) for _ in range(50)], run.state)  # which is far enough for a new copy
    good = run.content()
    run.guard.check([run.step(1.0), run.step(NAN), run.step(1.0)], run.state)
    assert_same(good, run.content())
    assert (run.state.step, run.state.skipped_steps, run.state.rollbacks, run.state.rate_factor) == (53, 1, 1, 0.5)
    assert "those after step 50 again; learning rates are now 0.5 times as scheduled" in caplog.text
    straight = Run("skip")
    for _ in range(50):
        straight.step(1.0)
    straight.optimizer.param_groups[0]["lr"] = 0.05
    for each in (run, straight):
        each.step(1.0)
    assert_same(straight.content(), run.content())
    assert run.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", ["AdamW", "SGD", "AdaFactor"])
def test_lowered_rates_make_a_step_as_much_smaller(name):
    """AdaFactor is one that uses the rate it is given; for one that does not, a rollback is refused."""
    settings = OptimizerSettings(name, ("relative_step=False",) if name == "AdaFactor" else (), learning_rate=0.01)
    changes = []
    for factor in (1.0, 0.5):
        parameter = nn.Parameter(torch.linspace(1.0, 2.0, 8192))
        optimizer = make_optimizer(settings, [{"name": "all", "params": [parameter]}], torch.device("cpu"))
        for rate_factor in (1.0, factor):
            before = parameter.detach().clone()
            parameter.grad = before - 0.3
            with lowered_rates(optimizer, rate_factor):
                optimizer.step()
        changes.append((parameter.detach() - before).norm().item())
    assert changes[1] == pytest.approx(0.5 * changes[0], rel=1e-3)


def test_a_rollback_takes_the_average_back_as_well():
    run = Run("rollback")
    average = AdapterEma(EmaSettings(ema_decay=0.5), run.network)
    run.guard = Guard("rollback", run.network, run.optimizer, run.scaler, average=average)

    def step(gradient):
        found = run.step(gradient)
        average.update(torch.tensor(found.is_finite))
        return found

    run.guard.check([step(1.0) for _ in range(50)], run.state)
    good = copy.deepcopy(average.state_dict())
    run.guard.check([step(1.0), step(NAN), step(1.0)], run.state)
    assert average.state_dict()["updates"] == good["updates"] == 50
    assert_same(good["average"], average.state_dict()["average"])


def test_rollback_goes_back_to_the_start_while_there_is_nothing_later():
    run = Run("rollback")
    run.guard.check([run.step(1.0), run.step(NAN)], run.state)
    assert run.weight() == 1.0
    run.optimizer.param_groups[0]["lr"] = 0.07  # the schedule goes on
    run.guard.check([run.step(1.0), run.step(NAN)], run.state)
    assert run.weight() == 1.0
    assert run.optimizer.param_groups[0]["lr"] == 0.07
    assert run.state.rate_factor == 0.25


def test_rollbacks_that_do_not_help_end_the_run():
    run = Run("rollback")
    for _ in range(MOST_ROLLBACKS):
        run.guard.check([run.step(1.0), run.step(NAN)], run.state)
    with pytest.raises(NonFiniteError, match="5 times going back to step 0 did not help"):
        run.guard.check([run.step(1.0), run.step(NAN)], run.state)


@pytest.mark.parametrize("policy", ["skip", "warn", "raise"])
def test_nothing_is_copied_to_main_memory_where_nothing_goes_back(policy, monkeypatch):
    monkeypatch.setattr("library.training.watching.guard.HostCopy", lambda parts: pytest.fail("a copy was made"))
    run = Run(policy)
    for _ in range(2):
        run.guard.check([run.step(1.0) for _ in range(50)], run.state)


def test_one_copy_serves_several_rollbacks():
    run = Run("rollback")
    run.guard.check([run.step(1.0) for _ in range(50)], run.state)
    good = run.content()
    for _ in range(2):
        run.guard.check([run.step(1.0), run.step(NAN)], run.state)
        assert_same(good, run.content())
