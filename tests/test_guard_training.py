"""Runs that meet a NaN, and runs that keep an average of the adapter."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from anima_train_network import AnimaNetworkTrainer, main
from library.training.watching.guard import Guard
from train_network import NetworkTrainer

NAN = float("nan")


def spoil_data(trainer, batch, share, add_gradients):
    latents = batch.latents_BCTHW.clone()
    latents[0] = NAN
    return add_gradients(trainer, replace(batch, latents_BCTHW=latents), share)


def spoil_loss(trainer, batch, share, add_gradients):
    losses = AnimaNetworkTrainer.losses
    AnimaNetworkTrainer.losses = lambda self, inputs: losses(self, inputs) * NAN
    try:
        return add_gradients(trainer, batch, share)
    finally:
        AnimaNetworkTrainer.losses = losses


def spoil_gradients(trainer, batch, share, add_gradients):
    loss = add_gradients(trainer, batch, share)
    next(trainer.network.parameters()).grad.view(-1)[0] = NAN
    return loss


@pytest.fixture
def harm(monkeypatch):
    """harm(spoil, step) spoils that step (the first is 0) of the runs that follow."""

    def do(spoil, step: int) -> None:
        add_gradients = NetworkTrainer.add_gradients

        def harmed(self, batch, share):
            if self.state.step == step:
                return spoil(self, batch, share, add_gradients)
            return add_gradients(self, batch, share)

        monkeypatch.setattr(NetworkTrainer, "add_gradients", harmed)

    return do


@pytest.fixture
def weights(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The network's and optimizer's tensors before the first step and after each."""
    seen = []
    step = NetworkTrainer.step

    def content(trainer) -> dict[str, torch.Tensor]:
        optimizer = trainer.parts.optimizer.state_dict()["state"]
        moments = {f"{index} {name}": value for index, own in optimizer.items() for name, value in own.items()}
        return {name: value.clone() for name, value in {**trainer.network.state_dict(), **moments}.items()}

    def recorded(self, batches, sample_count):
        if not seen:
            seen.append(content(self))
        loss = step(self, batches, sample_count)
        seen.append(content(self))
        return loss

    monkeypatch.setattr(NetworkTrainer, "step", recorded)
    return seen


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run_state(tmp_path, name: str) -> dict:
    return json.loads((tmp_path / "output" / f"{name}-state" / "run_state.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("spoil", "settings"),
    [
        (spoil_data, {}),
        (spoil_loss, {}),
        (spoil_gradients, {}),
        (spoil_gradients, {"scale_weight_norms": 1e-4, "network_args": ["train_norm=false"]}),
    ],
)
def test_a_spoilt_step_is_left_out_and_the_run_goes_on(config, harm, weights, tmp_path, capsys, spoil, settings):
    harm(spoil, step=1)
    assert main(config(max_train_steps=3, save_state_on_train_end=True, **settings)) == 0
    _, first, spoilt, third = weights
    assert same(first, spoilt) and not same(spoilt, third)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "output" / "tiny.safetensors").values())
    assert run_state(tmp_path, "tiny")["skipped_steps"] == 1
    messages = capsys.readouterr().err
    what = "gradients are" if spoil is spoil_gradients else "loss is"
    assert f"step 2: the {what} not finite (NaN or infinite); pictures: " in messages
    assert ".png" in messages.partition("pictures: ")[2].partition("\n")[0]


@pytest.mark.parametrize("asked", [{"on_nonfinite": "raise"}, {"anima_monitor_alert_policy": "raise"}])
def test_raise_saves_a_state_from_which_the_run_can_go_on(config, harm, weights, tmp_path, capsys, monkeypatch, asked):
    with monkeypatch.context():
        harm(spoil_loss, step=1)
        assert main(config(max_train_steps=3, log_every_n_steps=1, **asked)) == 1
    assert "error: step 2: the loss is not finite" in capsys.readouterr().err
    assert same(weights[1], weights[2]) and len(weights) == 3
    monkeypatch.undo()
    state = tmp_path / "output" / "tiny-step00000002-state"
    assert main([*config(max_train_steps=3), "--resume", str(state)]) == 0
    assert (tmp_path / "output" / "tiny.safetensors").is_file()


def test_rollback_goes_back_and_lowers_the_rate_in_the_state_and_on_the_curves(
    config, harm, weights, tmp_path, monkeypatch
):
    curves, rates_of = [], NetworkTrainer.rates

    def rates(self):
        curves.append(rates_of(self))
        return curves[-1]

    monkeypatch.setattr(NetworkTrainer, "rates", rates)
    harm(spoil_data, step=1)
    main(config(max_train_steps=3, on_nonfinite="rollback", log_every_n_steps=1, save_state_on_train_end=True))
    start, first, spoilt, _ = weights
    assert not same(start, first) and same(first, spoilt)
    state = run_state(tmp_path, "tiny")
    assert (state["step"], state["skipped_steps"], state["rollbacks"], state["rate_factor"]) == (3, 1, 1, 0.5)
    assert [point["lr/transformer"] for point in curves] == pytest.approx([1e-3, 1e-3, 5e-4])


def test_a_save_that_falls_between_log_points_is_judged_first(config, harm, weights, tmp_path):
    """Else a run that goes on from it would not go back, as this one does."""
    harm(spoil_data, step=1)
    main(
        config(max_train_steps=4, on_nonfinite="rollback", log_every_n_steps=50, save_every_n_steps=3, save_state=True)
    )
    state = run_state(tmp_path, "tiny-step00000003")
    assert (state["step"], state["skipped_steps"], state["rollbacks"], state["rate_factor"]) == (3, 1, 1, 0.5)
    saved = load_file(tmp_path / "output" / "tiny-step00000003-state" / "network.safetensors")
    assert all(torch.equal(tensor, weights[0][name]) for name, tensor in saved.items())


def test_a_stopped_run_has_drawn_and_judged_its_last_steps(config, harm, weights, tmp_path, monkeypatch):
    step = NetworkTrainer.step

    def stopped(self, batches, sample_count):
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches, sample_count)

    monkeypatch.setattr(NetworkTrainer, "step", stopped)
    harm(spoil_data, step=1)
    assert main(config(max_train_steps=9, on_nonfinite="rollback", log_every_n_steps=50)) == 130
    state = run_state(tmp_path, "tiny-step00000003")
    assert (state["step"], state["skipped_steps"], state["rollbacks"]) == (3, 1, 1)
    (progress,) = (tmp_path / "logs").glob("*/progress.jsonl")
    lines = map(json.loads, progress.read_text(encoding="utf-8").splitlines())
    assert [line["step"] for line in lines if line["event"] == "log"] == [1, 3]


def test_warn_takes_the_step(config, harm, tmp_path, capsys):
    harm(spoil_gradients, step=1)
    main(config(max_train_steps=2, on_nonfinite="warn"))
    assert "step 2: the gradients are not finite" in capsys.readouterr().err
    assert any(tensor.isnan().any() for tensor in load_file(tmp_path / "output" / "tiny.safetensors").values())


def test_norms_are_limited_without_reading_a_verdict_where_every_step_is_taken(config, monkeypatch):
    step = Guard.step
    monkeypatch.setattr(Guard, "step", lambda *arguments: step(*arguments).to("meta"))  # which cannot be read
    assert main(config(on_nonfinite="warn", scale_weight_norms=0.01)) == 0


def test_the_average_is_saved_beside_the_adapter_and_a_resumed_one_is_the_same(config, weights, tmp_path):
    """After n steps at most (1 + n) / (10 + n) of the average stays: 1/4 after the second, 4/13 after the third."""
    main(config(max_train_steps=3, ema_decay=0.3, output_name="straight"))
    straight = load_file(tmp_path / "output" / "straight-ema.safetensors")
    name = next(name for name in weights[0] if name.endswith("lora_up.weight"))
    first, second, third = (step[name] for step in weights[1:])
    expected = 0.3 * (first / 4 + second * 3 / 4) + 0.7 * third
    assert any(tensor.shape == expected.shape and torch.allclose(tensor, expected) for tensor in straight.values())

    main(config(max_train_steps=3, ema_decay=0.3, output_name="broken", save_every_n_steps=2, save_state=True))
    state = tmp_path / "output" / "broken-step00000002-state"
    (tmp_path / "output" / "broken-ema.safetensors").unlink()
    assert main([*config(max_train_steps=3, ema_decay=0.3, output_name="broken"), "--resume", str(state)]) == 0
    resumed = load_file(tmp_path / "output" / "broken-ema.safetensors")
    assert same(straight, resumed)


def test_an_average_of_an_average_is_refused_before_a_model_is_loaded(config, capsys, monkeypatch):
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    assert main(config(ema_decay=0.9, optimizer_type="AdamWScheduleFree")) == 1
    assert "ema_decay: AdamWScheduleFree averages the weights itself" in capsys.readouterr().err
