"""Aspect buckets: the sizes (width, height) in pixels that pictures are scaled and cropped to."""

from __future__ import annotations

import math
from collections.abc import Sequence

from library.data.settings import DatasetSettings
from library.errors import SettingError

# The VAE halves a side three times and the transformer joins 2x2 latents, so sides are whole multiples of 16 pixels.
SIDE_UNIT = 16


def bucket_sizes(dataset: DatasetSettings) -> tuple[tuple[int, int], ...]:
    """The dataset's buckets: one without enable_bucket, else for each side the longest other side within the budget.

    Sides are multiples of bucket_reso_steps from min_bucket_reso to max_bucket_reso, areas at most the resolution's.
    SettingError: the bucket settings contradict each other.
    """
    if not dataset.enable_bucket:
        return (fixed_size(dataset.resolution),)
    _check_limits(dataset)
    steps, budget = dataset.bucket_reso_steps, math.prod(dataset.resolution)
    longest = _round_down(dataset.max_bucket_reso, steps)
    sides = range(steps, longest + 1, steps)
    square = _round_down(math.isqrt(budget), steps)
    pairs = [(side, min(longest, _round_down(budget // side, steps))) for side in sides] + [(square, square)]
    fitting = {pair for pair in pairs if min(pair) >= dataset.min_bucket_reso and max(pair) <= longest}
    if not fitting:
        raise SettingError(
            f"no bucket fits: sides are multiples of bucket_reso_steps ({steps}) from min_bucket_reso "
            f"({dataset.min_bucket_reso}) to max_bucket_reso ({dataset.max_bucket_reso}), with an area of at most "
            f"{dataset.resolution[0]}x{dataset.resolution[1]} (resolution): widen one of them"
        )
    return tuple(sorted(fitting | {(height, width) for width, height in fitting}))


def _check_limits(dataset: DatasetSettings) -> None:
    shortest, longest = dataset.min_bucket_reso, dataset.max_bucket_reso
    if min(dataset.resolution) < shortest or max(dataset.resolution) > longest:
        raise SettingError(
            f"resolution {dataset.resolution[0]}x{dataset.resolution[1]} does not lie between min_bucket_reso "
            f"({shortest}) and max_bucket_reso ({longest}): change the one or the other"
        )


def choose_bucket(
    size: tuple[int, int], buckets: Sequence[tuple[int, int]], dataset: DatasetSettings
) -> tuple[int, int]:
    """The bucket that crops a picture of `size` least; of equal ones the largest.

    A picture scaled to cover a bucket loses 1 - exp(-d) of its area, where d is the difference of the logarithms of
    the two aspect ratios, so the nearest ratio crops least. With bucket_no_upscale a picture that the bucket would
    enlarge gets one of its own size instead.
    """
    width, height = size
    ratio = math.log(width / height)

    def preference(bucket: tuple[int, int]) -> tuple[float, int]:
        difference = abs(math.log(bucket[0] / bucket[1]) - ratio)
        return round(difference, 9), -bucket[0] * bucket[1]

    bucket = min(buckets, key=preference)
    enlarged = bucket[0] > width or bucket[1] > height
    return _own_size(size, dataset) if enlarged and dataset.enable_bucket and dataset.bucket_no_upscale else bucket


def _own_size(size: tuple[int, int], dataset: DatasetSettings) -> tuple[int, int]:
    """The picture's size, shrunk to the area budget and max_bucket_reso, each side rounded down to whole steps.

    A side shorter than a step is rounded down to a multiple of 16 instead, and one shorter than 16 becomes 16.
    """
    scale = min(1.0, dataset.max_bucket_reso / max(size), math.sqrt(math.prod(dataset.resolution) / math.prod(size)))
    width, height = (int(side * scale + 1e-6) for side in size)  # the sum undoes rounding such as 1023.9999 for 1024
    return _own_side(width, dataset.bucket_reso_steps), _own_side(height, dataset.bucket_reso_steps)


def _own_side(side: int, steps: int) -> int:
    return _round_down(side, steps) or _round_down(side, SIDE_UNIT) or SIDE_UNIT


def fixed_size(resolution: tuple[int, int]) -> tuple[int, int]:
    """The size whose sides are multiples of 16; the settings' warnings tell where it is another."""
    width, height = (_round_down(side, SIDE_UNIT) for side in resolution)
    return width, height


def _round_down(side: int, unit: int) -> int:
    return side // unit * unit
