"""Crops around faces: the face is whole in them, in the share that was asked for, and masks move alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from library.data.augment import Variant, draw_variant, load_variant
from library.data.faces import Face, face_of, warn_of_missing_faces
from library.data.masks import load_mask
from library.data.pictures import Picture
from library.data.settings import SubsetSettings


def picture(name, size=(1000, 800), bucket=(64, 64), face_crop_aug_range=(2.0, 4.0), **subset):
    own = SubsetSettings(face_crop_aug_range=face_crop_aug_range, **subset)
    return Picture(f"0/0/{name}", Path(name), "", size, bucket, 0, own)


def box_of(variant, own):
    """(left, top, right, bottom) of the crop in pixels of the picture."""
    scale = min(side / target for side, target in zip(own.size, own.bucket, strict=True)) * variant.zoom
    lengths = [target * scale for target in own.bucket]
    starts = [(side - length) * at for side, length, at in zip(own.size, lengths, variant.centring, strict=True)]
    return (*starts, *(start + length for start, length in zip(starts, lengths, strict=True)))


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("cat_500_400_100_120.png", Face((500, 400), (100, 120))),
        ("a_b_0_0_1_1.webp", Face((0, 0), (1, 1))),
        ("cat.png", None),
        ("500_400_100_120.png", None),
        ("cat_500_400_100.png", None),
        ("cat_500_400_100_-20.png", None),
        ("cat_500_400_100_12.5.png", None),
        ("IMG_2024_07_14_1230.jpg", None),
        ("cat_500_800_100_120.png", None),
        ("cat_500_400_0_120.png", None),
        ("cat_500_400_100_801.png", None),
    ],
)
def test_faces_in_names(name, face):
    assert face_of(picture(name)) == face


sides = st.integers(64, 3000)


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(sides, sides),
    bucket=st.sampled_from([(64, 64), (96, 48), (48, 96), (1024, 1024), (1536, 640)]),
    face=st.tuples(*[st.floats(0, 0.999)] * 2, *[st.floats(0.002, 1)] * 2),
    times=st.tuples(st.floats(1, 10), st.floats(1, 10)).map(sorted),
    random_crop=st.booleans(),
    repeat=st.integers(0, 5),
)
def test_the_face_is_in_the_crop(size, bucket, face, times, random_crop, repeat):
    numbers = [int(share * side) for share, side in zip(face, size * 2, strict=True)]
    numbers[2:] = [max(1, number) for number in numbers[2:]]
    name = "a_{}_{}_{}_{}.png".format(*numbers)
    own = picture(name, size, bucket, tuple(times), random_crop=random_crop)
    variant = draw_variant(own, 1, 0, repeat)
    left, top, right, bottom = box_of(variant, own)
    assert 0 < variant.zoom <= 1 and all(0 <= at <= 1 for at in variant.centring)
    x, y, width, height = numbers
    slack = 1e-6 * max(size)
    for centre, length, start, end, side in ((x, width, left, right, size[0]), (y, height, top, bottom, size[1])):
        if length <= end - start:  # else the crop's longest would be too small for it
            assert start <= max(0, centre - length / 2) + slack and end >= min(side, centre + length / 2) - slack
        assert start - slack <= centre <= end + slack
    # The drawn share, the least enlargement, and the picture's own size bound the crop.
    short, whole = min(right - left, bottom - top), max(t / s for t, s in zip(bucket, size, strict=True))
    longest, smallest = max(width, height), min(bucket) / max(whole, 1)
    largest = min(bucket) / whole
    assert min(max(longest * times[0], smallest), largest) - slack <= short
    assert short <= min(max(longest * times[1], smallest), largest) + slack


def test_the_range_is_used_whole_and_drawn_from_keys():
    own = picture("a_500_400_100_50.png")
    shares, offsets = [], []
    for repeat in range(2000):
        left, top, right, bottom = box_of(draw_variant(own, 1, 0, repeat), own)
        shares.append(100 / (bottom - top))
        offsets.append(((left + right) / 2 - 500, (top + bottom) / 2 - 400))
    np.testing.assert_allclose(np.quantile(shares, [0, 0.5, 1]), [0.25, 0.375, 0.5], atol=0.01)
    np.testing.assert_allclose(np.quantile(offsets, [0, 0.5, 1], axis=0), [[-5, -5], [0, 0], [5, 5]], atol=0.4)
    assert draw_variant(own, 1, 0, 3) == draw_variant(own, 1, 0, 3)
    others = [draw_variant(own, 2, 0, 3), draw_variant(own, 1, 1, 3), draw_variant(own, 1, 0, 4)]
    assert len({draw_variant(own, 1, 0, 3), *others}) == 4
    # Other choices do not move it, nor it them.
    turned = replace(own, subset=replace(own.subset, flip_aug=True, color_aug=True))
    plain = replace(turned, subset=replace(turned.subset, face_crop_aug_range=None))
    for repeat in range(20):
        drawn, without = draw_variant(turned, 1, 0, repeat), draw_variant(plain, 1, 0, repeat)
        assert (drawn.zoom, drawn.centring) == (draw_variant(own, 1, 0, repeat).zoom, drawn.centring)
        assert (drawn.flipped, drawn.hue, drawn.gamma) == (without.flipped, without.hue, without.gamma)


def test_with_random_crop_the_face_is_anywhere():
    own = picture("a_500_400_100_100.png", face_crop_aug_range=(4.0, 4.0), random_crop=True)
    lefts = [box_of(draw_variant(own, 1, 0, repeat), own)[0] for repeat in range(2000)]
    np.testing.assert_allclose(np.quantile(lefts, [0, 0.5, 1]), [150, 300, 450], atol=15)


def test_pictures_without_a_face_are_cropped_as_without_the_setting_and_counted_once(caplog):
    named, plain = picture("a_500_400_100_50.png"), picture("a.png")
    assert draw_variant(plain, 1, 0, 0) == Variant()
    crops = [replace(plain, subset=replace(plain.subset, random_crop=True, face_crop_aug_range=each))
             for each in (None, (2.0, 4.0))]  # fmt: skip
    assert draw_variant(crops[0], 1, 0, 0) == draw_variant(crops[1], 1, 0, 0) != Variant()
    warn_of_missing_faces([named, plain, replace(plain, key="other size")])
    (record,) = caplog.records
    assert "1 of 2 pictures do not end their names in a face" in record.getMessage() and "a.png" in record.getMessage()
    warn_of_missing_faces([named, picture("b.png", face_crop_aug_range=None)])
    assert len(caplog.records) == 1


def test_pixels_and_masks_are_of_the_crop(tmp_path):
    """Red is the column and green the row; the mask is their copy at half the size, white right of the face."""
    columns, rows = np.meshgrid(np.arange(240), np.arange(160))
    path = tmp_path / "a_120_80_30_20.png"
    Image.fromarray(np.stack([columns, rows, rows], axis=-1).astype(np.uint8)).save(path)
    mask = tmp_path / "mask.png"
    Image.fromarray(np.where(np.arange(120) >= 60, 255, 0).astype(np.uint8)[None].repeat(80, axis=0)).save(mask)
    own = replace(picture(path.name, (240, 160), (64, 64), flip_aug=True), path=path, mask=mask)
    seen = set()
    for repeat in range(30):
        variant = draw_variant(own, 1, 0, repeat)
        left, top, right, bottom = box_of(variant, own)
        assert 60 - 1e-6 <= right - left <= 120 + 1e-6
        pixels_CHW = (load_variant(own, variant) + 1) * 127.5
        corners = torch.stack([pixels_CHW[0, 0, [0, -1]], pixels_CHW[1, [0, -1], 0]])
        across = (right, left) if variant.flipped else (left, right)
        torch.testing.assert_close(corners, torch.tensor([[*across], [top, bottom]]) - 0.5, atol=1.5, rtol=0)
        mask_HW = load_mask(own, variant)
        share = (right - 120) / (right - left)
        assert abs(mask_HW.mean().item() - share) < 0.02
        assert (mask_HW[:, 0].mean() > mask_HW[:, -1].mean()) == variant.flipped
        seen.add(variant.flipped)
    assert seen == {False, True}
