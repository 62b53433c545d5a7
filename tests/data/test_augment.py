"""Variants: drawn from keys, with the shares and ranges that are documented, and acting on the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.augment import Variant, draw_variant, load_variant
from library.data.pictures import Picture
from library.data.settings import SubsetSettings


def picture(path=Path("a.png"), bucket=(64, 64), **subset):
    return Picture("0/0/a.png", path, "", (64, 64), bucket, 0, SubsetSettings(**subset))


def variants(count=3000, seed=1, **subset):
    own = picture(**subset)
    return [draw_variant(own, seed, 0, repeat) for repeat in range(count)]


def test_without_options_nothing_varies():
    assert set(variants(50)) == {Variant()}


def test_half_are_flipped_and_crops_are_anywhere():
    drawn = variants(flip_aug=True, random_crop=True)
    assert abs(sum(each.flipped for each in drawn) - 1500) < 4 * 27.4  # four standard deviations
    places = np.array([each.centring for each in drawn])
    assert places.min() >= 0 and places.max() <= 1
    np.testing.assert_allclose(np.quantile(places, [0.25, 0.5, 0.75], axis=0).T, [[0.25, 0.5, 0.75]] * 2, atol=0.05)
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.08


def test_a_third_are_recoloured_in_hue_or_gamma():
    drawn = variants(color_aug=True)
    hues, gammas = [each.hue for each in drawn if each.hue], [each.gamma for each in drawn if each.gamma != 1]
    assert not any(each.hue and each.gamma != 1 for each in drawn)
    for values in (hues, gammas):
        assert abs(len(values) - 500) < 4 * 20.4
    assert -16 / 360 <= min(hues) < -0.04 and 0.04 < max(hues) <= 16 / 360
    assert 0.95 <= min(gammas) < 0.955 and 1.045 < max(gammas) <= 1.05


def test_variants_follow_from_their_keys():
    options = {"flip_aug": True, "color_aug": True, "random_crop": True}
    assert variants(20, **options) == variants(20, **options) != variants(20, seed=2, **options)
    # One choice does not move another.
    assert [each.flipped for each in variants(20, flip_aug=True)] == [each.flipped for each in variants(20, **options)]


def test_hue_turns_colours_around():
    image = Image.new("RGB", (2, 2), (255, 0, 0))
    red, green, blue = Variant(hue=1 / 3).recolour(image).getpixel((0, 0))
    assert red < 8 and green == 255 and blue < 8
    assert Variant(hue=0.04).recolour(Image.new("RGB", (2, 2), (90, 90, 90))).getpixel((0, 0)) == (90, 90, 90)


def test_gamma_darkens_by_its_formula():
    image = Image.new("RGB", (2, 2), (255, 128, 0))
    assert Variant(gamma=1.05).recolour(image).getpixel((0, 0)) == (255, round(255 * (128 / 255) ** 1.05), 0)


def test_the_crop_is_where_it_was_drawn(tmp_path):
    """Red is the column: of 80 columns 32 are kept, so 48 lie outside."""
    columns, rows = np.meshgrid(np.arange(80), np.arange(32))
    Image.fromarray(np.stack([columns, rows, rows], axis=-1).astype(np.uint8)).save(tmp_path / "a.png")
    own = picture(tmp_path / "a.png", (32, 32), resize_interpolation="nearest")
    for centring, first in ((0.0, 0), (0.25, 12), (0.5, 24), (1.0, 48)):
        pixels_CHW = load_variant(own, Variant(centring=(centring, 0.5)))
        assert torch.equal(((pixels_CHW[0, 0] + 1) * 127.5).round(), torch.arange(first, first + 32.0))


@pytest.mark.parametrize(("name", "means"), [("nearest", False), ("area", True), ("lanczos", True), (None, True)])
def test_interpolation_acts(tmp_path, name, means):
    """Stripes of one pixel become grey, or with nearest stay black or white."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    pixels_CHW = load_variant(picture(tmp_path / "a.png", (16, 16), resize_interpolation=name), Variant())
    assert (pixels_CHW[:, 4:-4, 4:-4].abs() < 0.05).all() == means
    assert (pixels_CHW.abs() == 1).all() != means
