"""Data options through the whole trainer: masks and regularisation pictures act on the loss."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from anima_train_network import AnimaNetworkTrainer, main


@pytest.fixture
def batches(config, monkeypatch):
    """batches(**settings) -> (inputs, losses) of every batch of a run."""

    def run(**settings):
        seen = []
        losses = AnimaNetworkTrainer.losses

        def recorded(self, inputs):
            result = losses(self, inputs)
            seen.append((inputs, result.detach().clone()))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(AnimaNetworkTrainer, "losses", recorded)
            assert main(config(log_with="none", **settings)) == 0
        return seen

    return run


@pytest.fixture
def masks(tiny_anima, tmp_path):
    """masks("left", share) -> a folder of masks whose left share of the columns is white."""

    def draw(name, share):
        folder = tmp_path / name
        folder.mkdir()
        for path in (tiny_anima / "train").rglob("*.png"):
            with Image.open(path) as picture:
                width, height = picture.size
            values = np.zeros((height, width), np.uint8)
            values[:, : round(width * share)] = 255
            Image.fromarray(values).save(folder / path.name)
        return folder

    return draw


def test_masks_weight_the_loss(batches, masks):
    """The halves of a mask have twice the weight each, so that their losses' mean is that of the whole."""
    left, right = masks("left", 0.5), masks("right", 0.5)
    for path in right.iterdir():
        with Image.open(path) as mask:
            mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    folders = {"white": masks("white", 1), "black": masks("black", 0), "left": left, "right": right}
    losses = {name: batches(max_train_steps=1, conditioning_data_dir=folder)[0] for name, folder in folders.items()} | {
        "plain": batches(max_train_steps=1)[0]
    }
    plain = losses["plain"][1]
    assert torch.equal(losses["white"][1], plain)
    assert torch.equal(losses["black"][1], torch.zeros_like(plain))
    halves = losses["left"][1], losses["right"][1]
    assert not torch.allclose(*halves, rtol=0.02)
    torch.testing.assert_close((halves[0] + halves[1]) / 2, plain, rtol=0.01, atol=0)
    inputs = losses["left"][0]
    assert inputs.mask_B1HW.shape[-2:] == inputs.noisy_BCTHW.shape[-2:]


def test_regularisation_pictures_are_weighted_and_balanced(batches, tiny_anima, tmp_path):
    """One of them beside four others with ten repeats each, so it is repeated forty times."""
    (tmp_path / "reg" / "1_thing").mkdir(parents=True)
    shutil.copy(next((tiny_anima / "train").rglob("*.png")), tmp_path / "reg" / "1_thing")
    seen = batches(max_train_epochs=1, train_batch_size=16, reg_data_dir=tmp_path / "reg", prior_loss_weight=0.25)
    weights = torch.cat([inputs.weights_B for inputs, _ in seen])
    assert sorted(weights.tolist()) == [0.25] * 40 + [1.0] * 40


def test_last_batches_are_filled(batches, losses):
    """Each of four buckets has 10 uses: batches of 4, 4 and 2, of which filling makes 4. Losses are means over all."""
    plain, filled = (batches(max_train_epochs=1, **more) for more in ({}, {"fill_last_batches": True}))
    sizes = [[len(own) for _, own in seen] for seen in (plain, filled)]
    assert sorted(sizes[0]) == [2] * 4 + [4] * 8 and sizes[1] == [4] * 12
    means = [own.mean().item() for _, own in plain + filled]
    assert losses == pytest.approx(means, rel=1e-5)
