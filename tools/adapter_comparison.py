"""How two adapter files differ in what they change, module by module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import ModelFileError
from networks.adapter_files import AdapterFile
from networks.adapter_types import NORM_VALUE
from networks.deltas import bias_delta_of, delta_of
from networks.merging import changes_weight
from networks.network import part_of

# Deltas closer than this, relative to the longer one, are the same but for rounding in float32.
SAME = 1e-5


@dataclass(frozen=True)
class PartComparison:
    """Of the modules that both files have, their deltas taken as one long vector.

    norm_ratio: the second file's norm to the first's. Both are None where one of the deltas is zero.
    """

    modules: int
    cosine: float | None
    norm_ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """differing: ‖difference‖ / ‖the longer delta‖ by module.

    incomparable: modules of different shapes, not whole or finite, or with DoRA or absolute norm values, which need the
    base model.
    parts: by "transformer", "llm_adapter" and "text_encoder".
    """

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    differing: Mapping[str, float]
    incomparable: tuple[str, ...]
    parts: Mapping[str, PartComparison]


def compare_adapters(first: AdapterFile, second: AdapterFile) -> Comparison:
    """Reads the modules that both have, one at a time."""
    theirs = second.modules
    products: dict[str, list[tuple[float, float, float]]] = {}
    differing, incomparable = {}, []
    for path in first.modules:
        if path not in theirs:
            continue
        ours, other = _delta(first, path), _delta(second, path)
        if ours is None or other is None or ours.shape != other.shape:
            incomparable.append(path)
            continue
        products.setdefault(part_of(path), []).append((float(ours @ ours), float(ours @ other), float(other @ other)))
        longer = max(ours.norm(), other.norm())
        difference = float((ours - other).norm() / longer) if longer > 0 else 0.0
        if difference > SAME:
            differing[path] = difference
    return Comparison(
        only_first=tuple(path for path in first.modules if path not in theirs),
        only_second=tuple(path for path in theirs if path not in first.modules),
        differing=differing,
        incomparable=tuple(incomparable),
        parts={part: _compare(own) for part, own in products.items()},
    )


def _delta(file: AdapterFile, path: str) -> Tensor | None:
    """All that the module's adapter adds, as one vector: ΔW, then the bias's change. None: see incomparable."""
    try:
        own = file.module(path)
    except ModelFileError:
        return None
    if "dora_scale" in own or NORM_VALUE in own:
        return None
    deltas = [delta_of(own).flatten()] if changes_weight(own) else []
    bias = bias_delta_of(own)
    vector = torch.cat(deltas if bias is None else [*deltas, bias])
    return vector if vector.isfinite().all() else None


def _compare(products: list[tuple[float, float, float]]) -> PartComparison:
    """products: (a·a, a·b, b·b) of each module."""
    own, mixed, other = (sum(values) for values in zip(*products, strict=True))
    if not (own > 0 and other > 0):
        return PartComparison(len(products), None, None)
    return PartComparison(len(products), mixed / math.sqrt(own * other), math.sqrt(other / own))
