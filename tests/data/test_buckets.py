"""Bucket sizes and the choice among them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.buckets import bucket_sizes, choose_bucket
from library.data.settings import DatasetSettings
from library.errors import SettingError

BUCKETED = DatasetSettings(enable_bucket=True)


def chosen(size, dataset=BUCKETED):
    return choose_bucket(size, bucket_sizes(dataset), dataset)


def cropped_share(size, bucket):
    """Part of a picture's area lost when it is scaled to cover the bucket and cropped."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return 1 - bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)


def test_default_buckets():
    buckets = bucket_sizes(BUCKETED)
    assert (1024, 1024) in buckets and (256, 1024) in buckets and (1024, 256) in buckets
    assert all(max(bucket) <= 1024 and min(bucket) >= 256 for bucket in buckets)
    assert not any(side % 64 for bucket in buckets for side in bucket)


def test_wide_range_gives_the_usual_sizes():
    buckets = bucket_sizes(replace(BUCKETED, min_bucket_reso=512, max_bucket_reso=2048))
    assert {(1024, 1024), (832, 1216), (1216, 832), (768, 1344), (512, 2048)} <= set(buckets)
    assert max(width * height for width, height in buckets) == 1024 * 1024


def test_a_square_is_square_even_where_the_budget_is_not_in_whole_steps():
    assert chosen((500, 500), replace(BUCKETED, resolution=(1000, 1000))) == (960, 960)


@pytest.mark.parametrize("size, bucket", [((1000, 1000), (1024, 1024)), ((3000, 1000), (1024, 320))])
def test_nearest_ratio(size, bucket):
    assert chosen(size) == bucket


def test_equal_ratios_take_the_larger_area():
    assert choose_bucket((100, 100), [(512, 512), (1024, 1024), (768, 768)], BUCKETED) == (1024, 1024)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([16, 48, 64]), st.booleans())
def test_sides_are_multiples_and_the_crop_is_least(width, height, steps, no_upscale):
    dataset = replace(
        BUCKETED, resolution=(512, 512), bucket_reso_steps=steps, max_bucket_reso=1000, bucket_no_upscale=no_upscale
    )
    buckets = bucket_sizes(dataset)
    bucket = choose_bucket((width, height), buckets, dataset)
    assert bucket[0] % 16 == 0 and bucket[1] % 16 == 0 and min(bucket) >= 16
    assert math.prod(bucket) <= 512 * 512 and max(bucket) <= 1000
    if no_upscale:
        assert bucket[0] <= max(width, 16) and bucket[1] <= max(height, 16)
    else:
        least = min(cropped_share((width, height), other) for other in buckets)
        assert cropped_share((width, height), bucket) == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize(
    "size, bucket",
    [
        ((700, 300), (640, 256)),
        ((40, 300), (32, 256)),
        ((63, 300), (48, 256)),
        ((5, 5), (16, 16)),
        ((200, 4000), (48, 1024)),  # shrunk to a longest side of 1024: 51.2 x 1024
        ((4000, 4000), (1024, 1024)),
    ],
)
def test_no_upscale(size, bucket):
    assert chosen(size, replace(BUCKETED, bucket_no_upscale=True)) == bucket


def test_no_upscale_keeps_to_the_area_budget():
    dataset = replace(BUCKETED, resolution=(512, 512), max_bucket_reso=2048, bucket_no_upscale=True)
    assert chosen((250, 1500), dataset) == (192, 1216)  # shrunk by sqrt(512² / (250 * 1500)) = 0.836: 209 x 1254


def test_without_buckets_there_is_one_size():
    dataset = DatasetSettings(resolution=(1000, 512))
    assert bucket_sizes(dataset) == ((992, 512),)
    assert chosen((10, 4000), dataset) == (992, 512)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"min_bucket_reso": 1088}, r"resolution 1024x1024 .* min_bucket_reso \(1088\)"),
        ({"resolution": (1536, 1536)}, r"resolution 1536x1536 .* max_bucket_reso \(1024\)"),
        ({"resolution": (80, 80), "min_bucket_reso": 70, "max_bucket_reso": 120}, "no bucket fits"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(SettingError, match=message):
        bucket_sizes(replace(BUCKETED, **changes))
