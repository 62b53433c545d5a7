"""Optimizers in whole runs on the tiny model: what they save, how they resume, what their curves say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anima_train_network import AnimaNetworkTrainer, main

# RAdam waits five steps with its usual second beta.
SCHEDULE_FREE = {
    "AdamWScheduleFree": {},
    "RAdamScheduleFree": {"optimizer_args": ["betas=0.9,0.9"]},
    "ProdigyPlusScheduleFree": {"optimizer_args": ["d0=1e-3"], "learning_rate": 1},
}


@pytest.fixture
def weights(monkeypatch) -> list[torch.Tensor]:
    """All of the adapter's weights before the first step and after each."""
    seen, step = [], AnimaNetworkTrainer.step

    def keep(trainer) -> None:
        seen.append(torch.cat([parameter.detach().flatten() for parameter in trainer.network.parameters()]))

    def recorded(self, *arguments):
        if not seen:
            keep(self)
        loss = step(self, *arguments)
        keep(self)
        return loss

    monkeypatch.setattr(AnimaNetworkTrainer, "step", recorded)
    return seen


def adapter(folder: Path, name: str = "tiny") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_a_resumed_schedule_free_run_equals_one_that_never_saved(name, config, tmp_path, losses):
    pytest.importorskip("prodigyplus" if name.startswith("Prodigy") else "schedulefree")
    options = {"optimizer_type": name, "max_train_steps": 6, **SCHEDULE_FREE[name]}
    output = tmp_path / "output"
    assert main(config(**options)) == 0
    straight = adapter(output)
    assert main(config(save_every_n_steps=3, save_state=True, **options)) == 0
    assert main(config(resume=output / "tiny-step00000003-state", **options)) == 0
    assert losses[:6] == losses[6:12] == [*losses[:3], *losses[12:]]
    assert len(set(losses[:6])) == 6
    assert all(torch.equal(tensor, straight[key]) for key, tensor in adapter(output).items())


def test_the_averaged_weights_are_saved_and_sampled_and_the_trained_ones_kept_in_the_state(
    config, tmp_path, monkeypatch
):
    """Trained weights are y = (1 - β) z + β x, and x is the average (arXiv 2405.15682, equation 1)."""
    pytest.importorskip("schedulefree")
    shown = {}

    def look(self):
        shown[self.state.step] = self.network.state_dict()["blocks.0.self_attn.q_proj.lora_up.weight"].clone()

    monkeypatch.setattr(AnimaNetworkTrainer, "render_samples", look)
    (tmp_path / "prompts.txt").write_text("a cat", encoding="utf-8")
    words = config(
        optimizer_type="AdamWScheduleFree",
        optimizer_args=["betas=0.8,0.99"],
        max_train_steps=4,
        save_state=True,
        train_norm=False,
        sample_prompts=tmp_path / "prompts.txt",
        sample_every_n_steps=4,
    )
    assert main(words) == 0
    folder = tmp_path / "output" / "tiny-state"
    trained = load_file(folder / "network.safetensors")
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state_dict"]["state"]
    saved = adapter(tmp_path / "output")
    x = saved["diffusion_model.blocks.0.self_attn.q_proj.lora_up.weight"]
    y = trained["blocks.0.self_attn.q_proj.lora_up.weight"]
    distances = [(y - 0.2 * each["z"] - 0.8 * x).abs().max() for each in state.values() if each["z"].shape == y.shape]
    assert min(distances) < 1e-8
    assert (y - x).abs().max() > 1e-5
    assert torch.equal(shown[4], x)


def curves(logs: Path) -> dict[str, list[float]]:
    (folder,) = logs.iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [point.value for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_the_curve_shows_the_rate_that_each_step_took(config, tmp_path, weights):
    """One step of warm-up and two of falling: 0, 1 and 1/2 of the rate. At 0, nothing moves."""
    words = config(lr_scheduler="linear", lr_warmup_steps=1, max_train_steps=3, log_every_n_steps=1)
    assert main(words) == 0
    assert curves(tmp_path / "logs")["lr/transformer"] == pytest.approx([0, 1e-3, 5e-4])
    start, first, second, _ = weights
    assert torch.equal(start, first) and not torch.equal(first, second)


def test_the_curve_of_prodigys_own_rate_rises(config, tmp_path):
    pytest.importorskip("prodigyopt")
    assert main(config(optimizer_type="Prodigy", learning_rate=1, max_train_steps=5, log_every_n_steps=1)) == 0
    seen = curves(tmp_path / "logs")
    assert seen["lr/d*lr/transformer"][0] == pytest.approx(1e-6)  # d0, by which the first step goes
    assert seen["lr/transformer"] == [1.0] * 5
    assert seen["lr/d*lr/transformer"] == seen["lr/d*lr/llm_adapter"]
    assert seen["lr/d*lr/transformer"][0] < seen["lr/d*lr/transformer"][-1]


def test_adafactors_own_rate_is_on_the_curve(config, tmp_path):
    assert main(config(optimizer_type="AdaFactor", lr_scheduler="adafactor", log_every_n_steps=1)) == 0
    assert all(0 < rate <= 0.01 for rate in curves(tmp_path / "logs")["lr/transformer"])


def refused(monkeypatch: pytest.MonkeyPatch, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a run that must stop before a model is loaded."""
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    assert main(words) == 1
    return capsys.readouterr().err


def test_different_rates_for_prodigy_stop_before_models_load(config, monkeypatch, capsys):
    pytest.importorskip("prodigyopt")
    words = config(optimizer_type="Prodigy", learning_rate=1, llm_adapter_lr=0.5)
    assert "Prodigy cannot use different rates (transformer 1, llm_adapter 0.5)" in refused(monkeypatch, words, capsys)


def test_a_warmup_longer_than_the_run_stops_before_models_load(config, monkeypatch, capsys):
    message = refused(monkeypatch, config(max_train_steps=10, lr_warmup_steps=10), capsys)
    assert "lr_warmup_steps: 10 steps of rising rate leave none" in message
    assert "max_train_steps" in message


def test_showing_the_schedule_draws_it_and_loads_no_model(config, tmp_path, monkeypatch):
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    drawn = {}
    monkeypatch.setattr(
        "library.training.optimization.schedules.save_line_plot",
        lambda path, title, x_label, series: drawn.update(title=title, series=series),
    )
    words = config(max_train_epochs=2, lr_scheduler="linear", llm_adapter_lr=5e-4, show_lr_schedule="rate.png")
    assert main(words) == 0
    # 4 pictures, 10 repeats each, in batches of 4 of one bucket: 12 steps an epoch.
    assert drawn["title"] == "Learning rate: linear, 24 steps"
    expected = [1e-3 * (1 - step / 24) for step in range(24)]
    assert [rate for _, rate in drawn["series"]["transformer"]] == pytest.approx(expected)
    assert [rate for _, rate in drawn["series"]["llm_adapter"]] == pytest.approx([0.5 * rate for rate in expected])

    monkeypatch.undo()
    picture = tmp_path / "rate.png"
    assert main(config(max_train_steps=10, show_lr_schedule=picture)) == 0
    assert Image.open(picture).size == (800, 450)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("setting", ["show_lr_schedule", "show_timesteps"])
def test_drawing_goes_on_beside_an_earlier_runs_files(config, tmp_path, setting):
    words = config(max_train_steps=10, **{setting: tmp_path / "drawn.png"})
    adapter = tmp_path / "output" / "tiny.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"earlier")
    assert main(words) == 0
    assert (tmp_path / "drawn.png").is_file()
    assert adapter.read_bytes() == b"earlier"
