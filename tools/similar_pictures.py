"""Finds pictures that are alike: the same content, or copies that were scaled or saved anew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from library.console import progress_bar
from library.data.pixels import read_rgb

_SIDE = 16
# Grey levels that a place must be darker than its left neighbour: compression moves plain areas by less.
_STEP = 4
# Of 256 bits. Copies saved anew differ in a few; of other pictures most have 50 or more.
_MOST_DIFFERENCES = 10


def difference_hash(path: Path) -> int:
    """256 bits that tell where the grey picture, shrunk to 17x16, gets darker from left to right (a "dHash").

    DataError: the picture cannot be read.
    """
    small = read_rgb(path).convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    grey_HW = np.asarray(small).astype(int)
    darker = grey_HW[:, :-1] > grey_HW[:, 1:] + _STEP
    return int.from_bytes(np.packbits(darker).tobytes(), "big")


def difference_hashes(paths: Iterable[Path]) -> dict[Path, int]:
    """Each picture's, read by threads."""
    every = list(paths)
    with ThreadPoolExecutor() as pool, progress_bar(len(every), "comparing pictures") as bar:
        hashes = {}
        for path, found in zip(every, pool.map(difference_hash, every), strict=True):
            hashes[path] = found
            bar.update()
    return hashes


def groups_with_same(values: Mapping[Path, object]) -> list[list[Path]]:
    """The paths that share a value, where several do, in the order they are given."""
    paths_of = defaultdict(list)
    for path, value in values.items():
        paths_of[value].append(path)
    return [paths for paths in paths_of.values() if len(paths) > 1]


def groups_of_similar(hashes: Mapping[Path, int]) -> list[list[Path]]:
    """Groups in which each picture's hash is near to another's, in the order they are given."""
    group_of = {value: value for value in hashes.values()}

    def first_of(value: int) -> int:
        while group_of[value] != value:
            value = group_of[value]
        return value

    for one, other in _near_pairs(group_of):
        group_of[first_of(one)] = first_of(other)
    return groups_with_same({path: first_of(value) for path, value in hashes.items()})


def _near_pairs(hashes: Iterable[int]) -> Iterable[tuple[int, int]]:
    """Pairs that differ in few bits. Of one part more than that, one must be equal: only such pairs are compared."""
    parts = _MOST_DIFFERENCES + 1
    width = -(-_SIDE * _SIDE // parts)
    every = list(hashes)
    for number in range(parts):
        alike = defaultdict(list)
        for value in every:
            alike[value >> number * width & (1 << width) - 1].append(value)
        for values in alike.values():
            for one, other in combinations(values, 2):
                if (one ^ other).bit_count() <= _MOST_DIFFERENCES:
                    yield one, other
