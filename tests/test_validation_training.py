"""Validation in whole runs on the tiny model, against a computation by hand."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anima_train_network import AnimaNetworkTrainer, main
from library.randomness import torch_generator

# 4 pictures, one of them kept for validation, 10 repeats of the others
SPLIT = {"validation_split": 0.25, "validation_timesteps": 2}


@pytest.fixture
def trainers(monkeypatch) -> list[AnimaNetworkTrainer]:
    """Collects the trainers of the runs of a test."""
    seen = []
    train = AnimaNetworkTrainer.train

    def recorded(self):
        seen.append(self)
        train(self)

    monkeypatch.setattr(AnimaNetworkTrainer, "train", recorded)
    return seen


def curve(tmp_path, name):
    (folder,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@torch.no_grad()
def loss_by_hand(trainer, picture, share) -> float:
    """Pixels, noise, timestep and velocity of one picture, in plain maths around the model's own parts."""
    image = ImageOps.fit(Image.open(picture.path).convert("RGB"), picture.bucket, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    x0 = trainer.vae.loaded.encode(pixels)
    noise_seed = round(share * 1000)
    generator = torch_generator(noise_seed, "noise", -1, picture.key, 0)
    noise = torch.randn(x0.shape[1:], generator=generator)[None]
    normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(share, dtype=torch.float64))
    u = torch.sigmoid(normal).item()
    t = 3 * u / (1 + 2 * u)
    (states,) = trainer.text_encoder.encode([picture.caption])
    ones = torch.ones(1, len(states.qwen_states), dtype=torch.bool), torch.ones(1, len(states.t5_ids), dtype=torch.bool)
    context = trainer.transformer.encode_context(
        states.qwen_states[None], ones[0], states.t5_ids[None], ones[1], min_length=512
    )
    velocity = trainer.transformer((1 - t) * x0 + t * noise, torch.tensor([t], dtype=torch.float32), context)
    return (velocity - (noise - x0)).square().mean().item()


def test_the_validation_loss_is_what_a_computation_by_hand_gives(config, tmp_path, trainers):
    assert main(config(**SPLIT, max_train_steps=3, network_dropout=0.5, caption_dropout_rate=1.0)) == 0
    (trainer,) = trainers
    (picture,) = trainer.plan_run().validation
    trainer.network.eval()
    trainer.vae.loaded.to("cpu")
    losses = [loss_by_hand(trainer, picture, share) for share in (0.25, 0.75)]
    assert curve(tmp_path, "loss/validation/timestep_1")[3] == pytest.approx(losses[0], rel=1e-5)
    assert curve(tmp_path, "loss/validation/timestep_2")[3] == pytest.approx(losses[1], rel=1e-5)
    average, trained = (curve(tmp_path, f"loss/validation/{name}") for name in ("average", "trained_pictures"))
    assert list(average) == [0, 3]
    assert average[3] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert curve(tmp_path, "loss/validation/gap")[3] == pytest.approx(average[3] - trained[3], abs=1e-5)
    with_adapter, without = average[3], average[0]
    assert abs(with_adapter - without) > 1e-4


def test_measuring_twice_gives_the_same_and_leaves_training_alone(config, tmp_path, losses, trainers):
    settings = {"network_dropout": 0.3, "shuffle_caption": True, "optimizer_type": "AdamWScheduleFree"}
    main(config(max_train_steps=4, **SPLIT, **settings, validate_every_n_steps=1))
    trainers[0].network.eval()
    often = trainers[0].validation.curves()
    tensors = load_file(tmp_path / "output" / "tiny.safetensors")
    assert trainers[0].validation.curves() == often
    main(config(max_train_steps=4, **SPLIT, **settings, validate_every_n_steps=100))
    assert losses[:4] == losses[4:]
    again = load_file(tmp_path / "output" / "tiny.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_the_loss_does_not_depend_on_batches_caches_or_the_seed(config, tiny_anima, tmp_path, trainers):
    """One bucket for all, so that pictures do share batches; before training, since that depends on the batches."""
    base = {"validation_split": 0.5, "validation_seed": 1, "enable_bucket": False, "max_train_steps": 1}
    for settings in (
        {"train_batch_size": 1},
        {"train_batch_size": 4, "seed": 7},
        {"train_batch_size": 2, "cache_latents": False},
        {"train_batch_size": 4, "cache_text_encoder_outputs": True},
    ):
        assert main(config(**{**base, **settings}, learning_rate=1e-12)) == 0
    first, *others = [trainer.validation.curves()["loss/validation/average"] for trainer in trainers]
    assert 0 < first < 10
    assert others == pytest.approx([first] * 3, rel=1e-5)


def test_a_run_that_begins_later_may_begin_with_its_best_adapter_and_a_state(config, tmp_path):
    assert main(config(**SPLIT, max_train_steps=6, initial_step=4, save_state=True, save_best=True)) == 0
    state = json.loads((tmp_path / "output" / "tiny-best-state" / "run_state.json").read_text(encoding="utf-8"))
    assert state["best_step"] == state["step"] >= 4


def test_a_dataset_of_its_own_and_fewer_batches(config, tiny_anima, tmp_path, trainers, capsys):
    table = f"""
[general]
resolution = 64
[[datasets]]
[[datasets.subsets]]
image_dir = "{tiny_anima / "train" / "10_subject"}"
[[datasets]]
validation_split = 1
[[datasets.subsets]]
image_dir = "{tmp_path / "unseen"}"
flip_aug = true
"""
    shutil.copytree(tiny_anima / "train" / "10_subject", tmp_path / "unseen")
    (tmp_path / "data.toml").write_text(table)
    settings = {"dataset_config": tmp_path / "data.toml", "train_data_dir": "", "max_train_steps": 1}
    assert main(config(**settings, validate_every_n_steps=1, max_validation_steps=3)) == 0
    said = capsys.readouterr().err
    kept = "".join(f"\n  {path}" for path in sorted((tmp_path / "unseen").glob("*.png")))
    assert kept.count("\n") == 4
    told = f"validation_split keeps 4 of 8 pictures from training:{kept}\n"
    assert told in said and said.index(told) < said.index("validation after")
    # The middles of quarters of sigmoid(N(0, 1)), shifted by 3: sigmoid(-1.15), sigmoid(-0.32), …
    assert "validation: each picture at t = 0.49, 0.69, 0.80, 0.90" in said
    assert "validation after 1 steps: loss " in said
    assert len(trainers[0].plan_run().validation) == 4
    seen = []
    trainers[0].validation._losses_at = lambda batch, share: seen.append(batch.paths) or torch.zeros(len(batch.paths))
    trainers[0].validation.curves()
    assert len(seen) == 2 * 3 * 4  # three batches of each kind, four timesteps


def test_the_best_adapter_is_kept(config, tmp_path, monkeypatch, capsys):
    """After steps 1 to 4 the loss is 3, 2, 4, 2.5: the best is that of step 2."""
    values = iter([5.0, 3.0, 2.0, 4.0, 2.5])

    def curves(self):
        loss = next(values)
        return {"loss/validation/average": loss, "loss/validation/trained_pictures": loss}

    monkeypatch.setattr("library.training.watching.validation.Validation.curves", curves)
    settings = {"validate_every_n_steps": 1, "save_best": True, "save_state": True, "save_every_n_steps": 1}
    assert main(config(max_train_steps=4, **SPLIT, **settings)) == 0
    output = tmp_path / "output"
    assert (output / "tiny-best.safetensors").read_bytes()[:8]
    best, second, last = (load_file(output / f"tiny{name}.safetensors") for name in ("-best", "-step00000002", ""))
    assert all(torch.equal(tensor, second[name]) for name, tensor in best.items())
    assert any(not torch.equal(tensor, last[name]) for name, tensor in best.items())
    for folder, best_step in (("tiny-best-state", 2), ("tiny-step00000001-state", 1), ("tiny-state", 2)):
        state = json.loads((output / folder / "run_state.json").read_text())
        assert state["best_step"] == best_step
        assert state["best_validation_loss"] == (3.0 if best_step == 1 else 2.0)
    assert capsys.readouterr().err.count("the best so far") == 2

    # Resumed, the run knows what was best before.
    values = iter([2.2, 1.0])
    assert main(config(max_train_steps=6, **SPLIT, **settings, resume=output / "tiny-state")) == 0
    state = json.loads((output / "tiny-best-state" / "run_state.json").read_text())
    assert (state["best_step"], state["best_validation_loss"]) == (6, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_best": True}, "save_best: it needs a validation loss: set validation_split"),
        ({"validation_split": 1.0}, "validation_split keeps all pictures from training"),
        ({"validation_timesteps": 0}, "validation_timesteps: 0 is out of range"),
    ],
)
def test_mistakes_are_told_before_models_load(config, capsys, monkeypatch, settings, message):
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    assert main(config(**settings)) == 1
    assert message in capsys.readouterr().err


def test_settings_without_pictures_to_validate_are_told_to_do_nothing(config, capsys):
    assert main(config(validate_every_n_steps=5, validation_seed=3, dry_run=True)) == 0
    said = capsys.readouterr().err
    assert "validate_every_n_steps does nothing: no pictures are kept for validation: set validation_split" in said
    assert "validation_seed does nothing: no dataset is split" in said


def test_the_gap_grows_where_pictures_are_memorised(config, tmp_path, losses):
    settings = {"learning_rate": 1e-2, "network_dim": 8, "network_alpha": 8, "enable_bucket": False}
    assert main(config(max_train_steps=60, **SPLIT, **settings, validate_every_n_steps=60)) == 0
    trained, gap = curve(tmp_path, "loss/validation/trained_pictures"), curve(tmp_path, "loss/validation/gap")
    assert trained[60] < trained[0] * 0.8
    assert all(map(math.isfinite, gap.values()))
