"""Masked loss: weights on the grid of the latents, from masks and from alpha."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data.augment import Variant
from library.data.dataset import TrainingBatches
from library.data.masks import SMALLEST_AREA, load_loss_weights, load_mask, mask_weights
from library.data.pictures import Picture, scan_datasets
from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import DataError


def picture(path, mask=None, bucket=(64, 32), **subset):
    return Picture("0/0/a.png", path, "", (64, 32), bucket, 0, SubsetSettings(**subset), mask=mask)


def save_grey(path, values):
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def left_quarter(path):
    values = np.zeros((32, 64))
    values[:, :16] = 255
    return save_grey(path, values)


def test_a_mask_is_the_share_of_each_latents_pixels(tmp_path):
    values = np.zeros((32, 64))
    values[:, :12] = 255  # one and a half latents
    mask_HW = load_mask(picture(tmp_path / "a.png", save_grey(tmp_path / "m.png", values)), Variant())
    assert torch.equal(mask_HW, torch.tensor([1, 0.5, 0, 0, 0, 0, 0, 0]).repeat(4, 1))


def test_a_mask_goes_with_its_picture(tmp_path):
    """Mirrored, cropped and scaled alike: 128 x 64 to 32 x 32 keeps a half, of which the left or right end is asked."""
    mask = left_quarter(tmp_path / "m.png")
    own = picture(tmp_path / "a.png", mask)
    assert torch.equal(load_mask(own, Variant(flipped=True)), load_mask(own, Variant()).flip(1))
    square = picture(tmp_path / "a.png", mask, bucket=(32, 32))
    assert load_mask(square, Variant(centring=(0.0, 0.5))).mean() == 0.5
    assert load_mask(square, Variant(centring=(1.0, 0.5))).mean() == 0
    large = picture(tmp_path / "a.png", mask, bucket=(128, 64))
    assert load_mask(large, Variant()).mean() == pytest.approx(0.25, abs=0.01)


def test_the_red_channel_counts(tmp_path):
    Image.new("RGB", (64, 32), (51, 255, 255)).save(tmp_path / "m.png")
    assert torch.allclose(load_mask(picture(tmp_path / "a.png", tmp_path / "m.png"), Variant()), torch.tensor(0.2))


def test_alpha_is_a_mask(tmp_path):
    image = Image.new("RGBA", (64, 32), (9, 9, 9, 0))
    image.paste((9, 9, 9, 255), (0, 0, 32, 32))
    image.save(tmp_path / "a.png")
    mask_HW = load_mask(picture(tmp_path / "a.png", alpha_mask=True), Variant())
    assert torch.equal(mask_HW, torch.tensor([1.0] * 4 + [0.0] * 4).repeat(4, 1))
    Image.new("RGB", (64, 32)).save(tmp_path / "opaque.png")
    assert torch.equal(load_mask(picture(tmp_path / "opaque.png", alpha_mask=True), Variant()), torch.ones(4, 8))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 9))
def test_weights_are_bounded_and_as_strong_as_no_mask(height, width, share, seed):
    mask_HW = (torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share).float()
    weights = mask_weights(mask_HW)
    assert weights.isfinite().all() and (weights[mask_HW == 0] == 0).all()
    assert weights.max() <= 1 / SMALLEST_AREA + 1e-4
    expected = min(1.0, float(mask_HW.mean()) / SMALLEST_AREA)
    assert float(weights.mean()) == pytest.approx(expected, abs=1e-5)


def test_empty_whole_and_quarter():
    assert torch.equal(mask_weights(torch.zeros(4, 8)), torch.zeros(4, 8))
    assert torch.equal(mask_weights(torch.ones(4, 8)), torch.ones(4, 8))
    quarter = torch.tensor([[1.0, 0, 0, 0]])
    assert torch.equal(mask_weights(quarter), quarter * 4)


def test_a_tiny_mask_teaches_less_rather_than_weigh_more():
    """One of 144 latents would need a weight of 144."""
    tiny = torch.zeros(12, 12)
    tiny[3, 4] = 1
    assert torch.allclose(mask_weights(tiny), tiny / SMALLEST_AREA) and SMALLEST_AREA == 0.05


@pytest.fixture
def masked(tmp_path, draw):
    """scan(**subset): pictures a and b, of which a mask trains the left quarter, or all."""
    draw("pictures/a", (64, 32), "x")
    draw("pictures/b", (64, 32), "x")
    (tmp_path / "masks").mkdir()
    left_quarter(tmp_path / "masks" / "a.webp.png").rename(tmp_path / "masks" / "a.png")
    save_grey(tmp_path / "masks" / "b.png", np.full((16, 32), 255))  # half the size, but of the same shape

    def scan(**subset):
        dataset = DatasetSettings(
            resolution=(64, 32), subsets=(SubsetSettings(image_dir=tmp_path / "pictures", **subset),), batch_size=2
        )
        return scan_datasets([dataset], skip_broken=False, show_progress=False)

    scan.masks = tmp_path / "masks"
    return scan


def test_batches_carry_masks_in_the_order_of_their_pictures(masked):
    pictures = masked(conditioning_data_dir=masked.masks, flip_aug=True, num_repeats=4)
    flips = set()
    for step in TrainingBatches(pictures, [3], seed=1).epoch(0):
        (batch,) = step.batches
        assert batch.loss_mask_B1HW.shape == (len(batch.keys), 1, 4, 8)
        for (_, key, _), mask_1HW in zip(batch.keys, batch.loss_mask_B1HW, strict=True):
            row = mask_1HW[0, 0].tolist()
            if key.endswith("b.png"):
                assert row == [1.0] * 8
            else:
                assert sorted(row) == [0.0] * 6 + [4.0] * 2 and row in ([4.0] * 2 + [0.0] * 6, [0.0] * 6 + [4.0] * 2)
                flips.add(row[0])
    assert flips == {0.0, 4.0}


def test_without_masks_there_are_no_weights(masked):
    ((batch,),) = [step.batches for step in TrainingBatches(masked(), [2], seed=1).epoch(0)]
    assert batch.loss_mask_B1HW is None


def test_missing_and_misshapen_masks_are_named(masked):
    (masked.masks / "a.png").unlink()
    with pytest.raises(DataError, match=r"1 picture has no mask(?s:.)*a\.png \(nothing named a in"):
        masked(conditioning_data_dir=masked.masks)
    save_grey(masked.masks / "a.png", np.zeros((64, 64)))
    with pytest.raises(DataError, match=r"a\.png is 64x64, of another shape than (?s:.)*64x32"):
        masked(conditioning_data_dir=masked.masks)


def test_weights_of_a_picture_without_a_mask_are_ones(tmp_path):
    assert torch.equal(load_loss_weights(picture(tmp_path / "a.png"), Variant()), torch.ones(1, 4, 8))
