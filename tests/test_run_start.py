"""Runs that do not begin at their first step."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from anima_train_network import main
from library.anima_runtime import vae

# So low that the weights stay as they are: a step's loss then follows from its pictures and noise alone.
STILL = {"learning_rate": 1e-12, "log_with": "none"}


def test_a_skipped_beginning_leaves_the_pictures_and_noise_of_each_step_as_they_were(config, tmp_path, losses, capsys):
    """12 steps an epoch: 13 is the second of the second epoch."""
    assert main(config(max_train_steps=15, **STILL)) == 0
    straight = losses[:]
    losses.clear()
    assert main(config(max_train_steps=15, initial_step=13, skip_until_initial_step=True, **STILL)) == 0
    assert losses == pytest.approx(straight[13:], rel=1e-6)
    assert "beginning at step 13 of 15, in epoch 2; the learning rate schedule begins" in capsys.readouterr().err
    with safe_open(tmp_path / "output" / "tiny.safetensors", "pt") as file:
        assert (file.metadata()["ss_steps"], file.metadata()["ss_epoch"]) == ("15", "2")


def test_without_the_skip_the_epoch_starts_anew(config, losses):
    assert main(config(max_train_steps=14, **STILL)) == 0
    straight = losses[:]
    losses.clear()
    assert main(config(max_train_epochs=2, initial_epoch=2, **{**STILL, "save_every_n_steps": 100})) == 0
    assert len(losses) == 12
    assert losses[:2] == pytest.approx(straight[12:], rel=1e-6)
    losses.clear()
    assert main(config(max_train_steps=15, initial_step=13, **STILL)) == 0
    assert losses == pytest.approx(straight[12:], rel=1e-6)


def test_a_vae_in_fp32_beside_a_half_precision_model(config, monkeypatch):
    dtypes = []
    load_vae = vae.load_vae

    def recorded(path, dtype, device):
        dtypes.append(str(dtype))
        return load_vae(path, dtype, device)

    monkeypatch.setattr(vae, "load_vae", recorded)
    for no_half_vae in (True, False):
        assert main(config(max_train_steps=1, no_half_vae=no_half_vae, full_bf16=True)) == 0
    assert dtypes == ["torch.float32", "torch.bfloat16"]


def test_a_state_knows_better_where_to_go_on(config, tmp_path, losses, capsys):
    """So that the settings of a run that began later can be used again with --resume."""
    assert main(config(max_train_steps=6, initial_step=4, save_state=True, save_every_n_steps=5)) == 0
    state = tmp_path / "output" / "tiny-step00000005-state"
    assert main(config(max_train_steps=6, initial_step=9, resume=state)) == 0
    assert losses[2] == losses[1] and len(losses) == 3
    assert "initial_step does nothing: resume goes on from where the state was saved" in capsys.readouterr().err
