"""Several adapters, each with a strength, summed into one adapter or into a model's weight; all sums in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import ModelFileError, SettingError, first_ten
from networks.adapter_types import NORM_VALUE, Adapters, adapter_kind, tensor_shapes, weight_shape
from networks.deltas import adapter_of, bias_delta_of, delta_of
from networks.low_rank import decompose, decompose_product

Part = tuple[Mapping[str, Tensor], float]


@dataclass(frozen=True)
class MergedAdapters:
    """relative_errors: ‖ΔW - its approximation‖ / ‖ΔW‖ by module path, of the modules that are not exact."""

    adapters: Adapters
    relative_errors: Mapping[str, float]


def merge_adapters(
    sources: Sequence[tuple[Adapters, float]], rank: int | None, progress: Callable[[], object] = lambda: None
) -> MergedAdapters:
    """One adapter that changes the weights as all sources do together, each times its strength.

    Exact: a module with one adapter, LoRA with LoRA (their ranks add up), norms, and plain differences with anything.
    rank: the other sums, and sums of LoRA with more ranks, become the nearest LoRA of this rank; None refuses them.
    progress: called after each module; a dense one of 2048 x 8192 takes some seconds.
    Raises ModelFileError for modules that differ in shape or cannot be summed, SettingError where a rank is needed.
    """
    parts = {path: _parts(path, sources) for adapters, _ in sources for path in adapters}
    for path, own in parts.items():
        _check_summable(path, own)
    if rank is None and (inexact := [path for path, own in parts.items() if not _is_exact(own)]):
        raise SettingError(
            f"--rank: {len(inexact)} modules cannot be summed exactly, as their types differ or are LoKr or LoHa: "
            f"{first_ten(inexact)}. Give --rank N for the nearest LoRA of rank N, or merge into a checkpoint."
        )
    merged, relative_errors = {}, {}
    for path, own in parts.items():
        if _is_exact(own) and (rank is None or _total_rank(own) <= rank):
            merged[path] = _exact_sum(own)
        else:
            merged[path], relative_errors[path] = _nearest_lora(own, rank)
        progress()
    return MergedAdapters(merged, relative_errors)


def merged_weight(weight: Tensor, tensors: Mapping[str, Tensor], strength: float) -> Tensor:
    """A float32 weight with one module's adapter in it, as ComfyUI applies it.

    W + strength · ΔW; with DoRA W + strength · ((W + ΔW) · dora_scale / ‖W‖ - W), the norm taken row by row.
    """
    if "dora_scale" not in tensors:
        return torch.add(weight, delta_of(tensors), alpha=strength)
    merged = weight + adapter_of(tensors).delta_weight()
    merged = merged * (tensors["dora_scale"].float() / weight.norm(dim=1, keepdim=True))
    return torch.lerp(weight, merged, strength)


def changes_weight(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one module's adapter changes the weight, not only the bias."""
    return not tensors.keys() <= {"b_norm", "diff_b"}


def _parts(path: str, sources: Sequence[tuple[Adapters, float]]) -> list[Part]:
    return [(adapters[path], strength) for adapters, strength in sources if path in adapters]


def _check_summable(path: str, parts: Sequence[Part]) -> None:
    shapes = [weight_shape(path, tensor_shapes(tensors)) for tensors, _ in parts if changes_weight(tensors)]
    if len(set(shapes)) > 1:
        raise ModelFileError(f"{path} has weights of different shapes: {shapes}; the files are for different models")
    if any(NORM_VALUE in tensors for tensors, _ in parts):
        raise ModelFileError(
            f"{path} holds an absolute norm value; turn the file's into differences first: tools/convert_adapter.py "
            "with --base_model"
        )
    if any("dora_scale" in tensors for tensors, _ in parts) and (len(parts) > 1 or parts[0][1] != 1):
        raise ModelFileError(
            f"{path} has DoRA, which rescales the base weight: it cannot be summed or weighted without the base. "
            "Merge into a checkpoint (--checkpoint) instead."
        )


def _is_exact(parts: Sequence[Part]) -> bool:
    kinds = _kinds(parts)
    return len(parts) == 1 or kinds == {"lora"} or bool(kinds & {"norm", "diff"})


def _kinds(parts: Sequence[Part]) -> set[str]:
    return {adapter_kind("the adapter", tensors) for tensors, _ in parts}


def _total_rank(parts: Sequence[Part]) -> int:
    """Of a sum of LoRA; 0 for what keeps its own form."""
    is_sum = len(parts) > 1 and _kinds(parts) == {"lora"}
    return sum(tensors["lora_down.weight"].shape[0] for tensors, _ in parts) if is_sum else 0


def _exact_sum(parts: Sequence[Part]) -> dict[str, Tensor]:
    kinds = _kinds(parts)
    if kinds & {"norm", "diff"}:
        return _dense_sum(parts, ("w_norm", "b_norm") if kinds == {"norm"} else ("diff", "diff_b"))
    if len(parts) > 1:
        return _lora(*_concatenated(parts))
    tensors, strength = parts[0]
    if strength == 1:
        return dict(tensors)
    adapter = adapter_of(tensors)
    adapter.shrink(torch.tensor(strength))
    return adapter.tensors()


def _dense_sum(parts: Sequence[Part], suffixes: tuple[str, str]) -> dict[str, Tensor]:
    weights = [strength * delta_of(tensors) for tensors, strength in parts if changes_weight(tensors)]
    biases = [strength * bias for tensors, strength in parts if (bias := bias_delta_of(tensors)) is not None]
    return {suffix: sum(deltas) for suffix, deltas in zip(suffixes, (weights, biases), strict=True) if deltas}


def _concatenated(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Σ sᵢ upᵢ downᵢ = [s₁ up₁, s₂ up₂, …] [down₁; down₂; …], the strengths and scales multiplied into up."""
    ups, downs = [], []
    for tensors, strength in parts:
        lora = adapter_of(tensors)
        ups.append(strength * lora.scale * lora.lora_up.weight)
        downs.append(lora.lora_down.weight)
    return torch.cat(ups, dim=1), torch.cat(downs)


def _nearest_lora(parts: Sequence[Part], rank: int) -> tuple[dict[str, Tensor], float]:
    """The LoRA of a rank nearest to the sum, and its relative error."""
    if _kinds(parts) == {"lora"}:
        found = decompose_product(*_concatenated(parts))
    else:
        found = decompose(sum(strength * delta_of(tensors) for tensors, strength in parts))
    up, down = found.factors(rank)
    return _lora(up.float(), down.float()), found.relative_error(rank)


def _lora(up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """With alpha = rank, a strength of 1."""
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(down.shape[0]))}
