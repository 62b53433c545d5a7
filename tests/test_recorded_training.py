"""Whole runs as they are where steps are recorded, without a GPU to record them, against runs as they are elsewhere.

Gradients stay where they are then, and those, weights and moments of AdamW are views of long tensors.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import train_network
from anima_train_network import main
from library.training.choices import Choice
from library.training.optimization.flat_adamw import FlatAdamW
from library.training.optimization.gradient_sums import add_gradients
from train_network import NetworkTrainer


class UnrecordedBackward:
    """In place of `CapturedBackward`: the same gradients at the same places, computed anew each time."""

    def __init__(self, losses, parameters):
        self._losses = losses
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self, inputs, share):
        losses = self._losses(inputs)
        add_gradients(losses.sum() * share, self._parameters)
        return losses.detach()


@pytest.fixture
def run(config, monkeypatch):
    """run(recorded, **settings): a run with fused AdamW; from the first recorded one on, all are."""

    def do(recorded: bool, **settings) -> None:
        if recorded:
            monkeypatch.setattr(train_network, "choose_graphs", lambda *_: Choice("cuda_graphs", True, "as set"))
            monkeypatch.setattr(train_network, "CapturedBackward", UnrecordedBackward)
        arguments = ["fused=True", "weight_decay=0.1"]
        assert main(config(optimizer_args=arguments, log_with="none", save_state=True, **settings)) == 0

    return do


@pytest.fixture
def flat_steps(monkeypatch) -> list[FlatAdamW]:
    """An entry for each step over long tensors."""
    seen = []
    step = FlatAdamW._step_flat

    def recorded(self):
        seen.append(self)
        step(self)

    monkeypatch.setattr(FlatAdamW, "_step_flat", recorded)
    return seen


def assert_same_files(folder, one: str, other: str) -> None:
    names = [path.name.removeprefix(one) for path in sorted(folder.glob(f"{one}*.safetensors"))]
    assert names
    for name in names:
        expected, found = load_file(folder / f"{one}{name}"), load_file(folder / f"{other}{name}")
        for key, tensor in expected.items():
            assert (found[key] - tensor).norm() <= 1e-3 * tensor.norm(), (name, key)


RUNS = {
    "accumulation, an average, dropouts": {
        "gradient_accumulation_steps": 2, "ema_decay": 0.9, "network_dropout": 0.1,
        "network_args": ["module_dropout=0.3"],
    },
    "lokr, a frozen part": {
        "network_module": "networks.lokr_anima", "network_args": ["factor=4", "network_reg_lrs=.*q_proj=0"],
    },
    "loraplus, norms limited, a copy to roll back to": {
        "network_args": ["loraplus_lr_ratio=4"], "scale_weight_norms": 0.01, "on_nonfinite": "rollback",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_equals_a_plain_one_and_goes_on_from_its_state(run, tmp_path, losses, flat_steps, name):
    settings = {**RUNS[name], "max_train_steps": 5, "save_every_n_steps": 3}
    run(False, **settings, output_name="plain")
    assert not flat_steps
    run(True, **settings, output_name="recorded")
    assert len(flat_steps) == 5
    assert losses[5:] == pytest.approx(losses[:5], rel=1e-5)
    assert_same_files(tmp_path / "output", "plain", "recorded")
    run(True, **settings, output_name="resumed", resume=tmp_path / "output" / "plain-step00000003-state")
    assert len(flat_steps) == 7
    assert losses[10:] == pytest.approx(losses[3:5], rel=1e-5)
    (tmp_path / "output" / "plain-step00000003.safetensors").unlink()
    (tmp_path / "output" / "plain-step00000003-ema.safetensors").unlink(missing_ok=True)
    assert_same_files(tmp_path / "output", "plain", "resumed")


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_step_that_is_not_finite_harms_a_recorded_run_no_more_than_a_plain_one(
    run, tmp_path, losses, flat_steps, monkeypatch, policy
):
    add_gradients = NetworkTrainer.add_gradients

    def harmed(self, batch, share):
        return add_gradients(self, batch, float("nan") if self.state.step == 2 else share)

    monkeypatch.setattr(NetworkTrainer, "add_gradients", harmed)
    settings = {"max_train_steps": 5, "save_every_n_steps": 3, "on_nonfinite": policy, "ema_decay": 0.9}
    for recorded, name in ((False, "plain"), (True, "recorded")):
        run(recorded, **settings, output_name=name)
        states = [tmp_path / "output" / f"{name}{end}" / "run_state.json" for end in ("-step00000003-state", "-state")]
        counted = [json.loads(path.read_text(encoding="utf-8")) for path in states]
        assert [state["skipped_steps"] for state in counted] == [1, 1]
        assert [state["rollbacks"] for state in counted] == [int(policy == "rollback")] * 2
    assert losses[5:] == pytest.approx(losses[:5], rel=1e-5, nan_ok=True)
    assert len(flat_steps) == 5
    assert_same_files(tmp_path / "output", "plain", "recorded")
