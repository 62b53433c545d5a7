"""How values of the data settings are written: resolutions, separators, ranges."""

from __future__ import annotations

import math
from typing import Any


def parse_resolution(value: Any) -> tuple[int, int]:
    """An int, [width, height], "1024" or "832,1216" -> (width, height) in pixels; ValueError for anything else."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    sides = [_whole_number(part) for part in parts]
    if len(sides) not in (1, 2) or any(side is None or side < 16 for side in sides):
        raise ValueError(
            "expected a side in pixels such as 1024, or [width, height], each 16 or more; several sizes go into "
            "resolutions"
        )
    return sides[0], sides[-1]


def parse_resolutions(value: Any) -> tuple[tuple[int, int], ...]:
    """[512, 1024], [[832, 1216], 1024] or one such entry -> a size (width, height) for each; ValueError otherwise.

    Every entry is a resolution of its own, as `parse_resolution` reads it: two numbers are two sizes here.
    """
    entries = value if isinstance(value, list | tuple) else [value]
    sizes = tuple(parse_resolution(entry) for entry in entries)
    if len(set(sizes)) < len(sizes):
        raise ValueError("expected each size once")
    return sizes


def are_several(value: Any) -> bool:
    """Whether a resolution's value is a list of sizes, as no width and height are: three or more, or pairs in it."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    return len(value) > 2 or any(isinstance(entry, list) or "," in str(entry) for entry in value)


def parse_separator(value: Any) -> str:
    """Text of at least one character; ValueError for anything else."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected the text that separates tags, such as ','")
    return value


def parse_face_crop_range(value: Any) -> tuple[float, float]:
    """ "2.0,4.0" or [2.0, 4.0] -> (2.0, 4.0); ValueError for anything else than two numbers of 1 or more in order."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers = [_number(part) for part in parts]
    if len(numbers) != 2 or None in numbers or not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(
            'expected how many times as long as the face a crop is, at least and at most, such as "2.0,4.0": two '
            "numbers of 1 or more, the lower one first"
        )
    return numbers[0], numbers[1]


def _whole_number(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    """A finite number from a number or its text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
