"""The loop's own arithmetic, on a toy model: one number to learn."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from library.data.dataset import Batch
from library.settings import Settings
from library.settings.groups import run_groups
from library.training.optimization.optimizers import OptimizerSettings
from library.training.saving.states import Resumable
from library.training.step_records import SampleLoss, StepRecord
from library.training.watching.guard import Guard
from tests.training_runs import read_records
from train_network import NetworkTrainer


def make_settings(**groups) -> Settings:
    defaults = {name: group() for name, group in run_groups().items()}
    defaults["optimizer"] = OptimizerSettings(max_grad_norm=0.0)
    return Settings(**{**defaults, "datasets": (), "given": {}, **groups})


def make_batch(values: list[float], counted: bool = True) -> Batch:
    """A sample's number stands in its caption."""
    names = [str(value) for value in values]
    keys, paths, count = [(0, name, 0) for name in names], [Path(name) for name in names], len(names)
    return Batch(None, None, names, keys, paths, (64, 96), counted, torch.ones(count), [0] * count)


class ToyInputs(NamedTuple):
    rows_B: torch.Tensor
    timesteps_B: torch.Tensor
    numbers_B1: torch.Tensor


class ToyTrainer(NetworkTrainer):
    """The loss of a sample is weight * its number, so its gradient is the number."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, Accelerator(mixed_precision="no"))
        self.device = torch.device("cpu")
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.network.weight)
        self.trained = list(self.network.parameters())
        optimizer = torch.optim.SGD([{"params": list(self.network.parameters()), "name": "all"}], lr=1.0)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        self.parts = Resumable(self.network, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False))
        self.guard = Guard(settings.guard.on_nonfinite, self.network, optimizer, self.parts.scaler)
        self.ema = None

    def prepare(self, batch: Batch) -> list[ToyInputs]:
        """The last sample apart from the others, as if its caption were longer; its timestep is 0.5."""
        numbers_B1 = torch.tensor([[float(caption)] for caption in batch.captions])
        rows = torch.arange(len(numbers_B1))
        return [
            ToyInputs(rows[part], torch.full((len(rows[part]),), 0.5), numbers_B1[part])
            for part in (slice(-1, None), slice(None, -1))
            if len(rows[part])
        ]

    def prepare_at(self, batch: Batch, share: float) -> list[ToyInputs]:
        return self.prepare(batch)

    def timestep_at(self, share, picture):
        return share

    def losses(self, inputs: ToyInputs) -> torch.Tensor:
        return self.network(inputs.numbers_B1)[:, 0]

    def load_models(self):
        return nn.Identity(), nn.Identity()

    def plan_models(self, problems):
        return self.load_models()

    def encode_pixels(self, pixels_BCHW):
        return pixels_BCHW

    def latent_identity(self):
        return "toy"

    def latents_are_cached(self):
        """It has no VAE."""

    place_models = latents_are_cached

    def prepare_text(self, folder):
        """It takes captions as they are."""

    encode_ahead = prepare_text

    def fuse_obstacle(self):
        return "it has no blocks"

    def choose_memory(self, fuses, network):
        return []

    def fuse_blocks(self, buckets):
        """It has none."""

    def keep_modules(self):
        """They are as they are."""

    def compile_blocks(self, buckets):
        """It has none."""

    def render_samples(self):
        """It has no pictures."""

    def model_files(self):
        return {}

    model_facts = model_files

    def moved(self, *batches: Batch) -> float:
        """How far one step with learning rate 1 moves the weight: the mean gradient."""
        before = self.network.weight.item()
        self.step(list(batches), sum(len(batch.captions) for batch in batches if batch.counted))
        return before - self.network.weight.item()


def test_a_steps_gradient_is_the_mean_over_all_its_samples():
    """Batches of unequal size must not weigh their samples differently."""
    whole = ToyTrainer(make_settings()).moved(make_batch([1.0, 2.0, 3.0, 10.0]))
    uneven = ToyTrainer(make_settings()).moved(make_batch([1.0, 2.0, 3.0]), make_batch([10.0]))
    assert whole == uneven == pytest.approx(4.0)


def test_a_padding_batch_adds_nothing():
    assert ToyTrainer(make_settings()).moved(make_batch([2.0]), make_batch([50.0], counted=False)) == pytest.approx(2.0)


def test_the_reported_loss_is_that_mean():
    trainer = ToyTrainer(make_settings())
    trainer.moved(make_batch([3.0]))  # the weight is now -3
    loss = trainer.step([make_batch([1.0, 2.0]), make_batch([6.0])], 3)
    assert loss.item() == pytest.approx(-9.0)
    assert not loss.requires_grad


def test_the_losses_of_samples_go_with_their_pictures():
    trainer = ToyTrainer(make_settings())
    trainer.moved(make_batch([1.0]))  # the weight is now -1
    trainer.step([make_batch([2.0, 3.0]), make_batch([7.0]), make_batch([9.0], counted=False)], 3)
    _, second = read_records(trainer, 2)
    expected = tuple(SampleLoss(Path(f"{number}"), 0.5, -number) for number in (3.0, 2.0, 7.0))
    assert second == StepRecord(2, -4.0, 4.0, expected)


def test_a_step_that_is_not_finite_moves_nothing_and_the_next_one_does():
    trainer = ToyTrainer(make_settings())
    assert trainer.moved(make_batch([float("nan"), 1.0])) == 0
    assert trainer.moved(make_batch([float("inf")])) == 0
    assert trainer.moved(make_batch([2.0])) == 2
    assert [record.is_finite for record in read_records(trainer, 3)] == [False, False, True]


def test_steps_in_fp16_are_not_recorded():
    trainer = ToyTrainer(make_settings())
    assert trainer.capture_obstacle() is None
    trainer.parts = replace(trainer.parts, scaler=torch.amp.GradScaler("cpu", enabled=True))
    assert trainer.capture_obstacle() == "the model runs in fp16"


def test_gradients_are_clipped_over_the_whole_step():
    settings = make_settings(optimizer=OptimizerSettings(max_grad_norm=0.5))
    assert ToyTrainer(settings).moved(make_batch([30.0]), make_batch([10.0])) == pytest.approx(0.5)
