"""What ComfyUI makes of an adapter file, by its loader's own rules (version 0.29), apart from this trainer's tables.

ComfyUI skips a key it does not know with a line in its log, and where two spellings name one weight it keeps one of
them. So a file is read here as ComfyUI does, and whatever would be lost or scaled otherwise is a problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from networks.module_names import has_bias

_LOW_RANK = (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight"))
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_SUFFIXES = (
    *(suffix for pair in _LOW_RANK for suffix in pair),
    *_LOHA,
    *_LOKR,
    *("alpha", "dora_scale", "w_norm", "b_norm", "diff", "diff_b"),
)


@dataclass(frozen=True)
class ComfyPatch:
    """What is added to one parameter: strength times the product of its factors. kind: "lora", "lokr", "diff", ..."""

    module: str
    kind: str
    strength: float


@dataclass
class ComfyReading:
    """patches by parameter ("blocks.0.mlp.layer1.weight"); problems: one line each, empty for a sound file."""

    patches: dict[str, ComfyPatch] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def check_comfyui_reads(tensors: Mapping[str, Tensor], model_shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The problems ComfyUI would have with a file, one line each; see `read_as_comfyui`."""
    return read_as_comfyui(tensors, model_shapes).problems


def read_as_comfyui(tensors: Mapping[str, Tensor], model_shapes: Mapping[str, tuple[int, ...]]) -> ComfyReading:
    """Which parameter each module of the file changes, and with which strength.

    tensors: by the file's keys. model_shapes: weight shapes by module path; the text encoder's after "text_encoder.".
    """
    reading = ComfyReading()
    unread = set(tensors)
    for spelling, path in _spellings(model_shapes).items():
        own = {suffix: tensors[f"{spelling}.{suffix}"] for suffix in _SUFFIXES if f"{spelling}.{suffix}" in tensors}
        if not own:
            continue
        unread -= {f"{spelling}.{suffix}" for suffix in own}
        used: set[str] = set()
        for parameter, patch, suffixes in _patches(spelling, own):
            used |= set(suffixes)
            _add_patch(reading, f"{path}.{parameter}", patch)
        reading.problems += [
            f"{spelling}.{suffix}: not read, as it belongs to nothing" for suffix in own if suffix not in used
        ]
        reading.problems += _value_problems(spelling, path, own, tuple(model_shapes[path]))
    reading.problems += [f"{key}: ComfyUI reads no such key" for key in tensors if key in unread]
    return reading


def _add_patch(reading: ComfyReading, parameter: str, patch: ComfyPatch) -> None:
    other = reading.patches.get(parameter)
    if other is not None:
        reading.problems.append(
            f"{other.module} ({other.kind}) and {patch.module} ({patch.kind}) both change {parameter}; one is lost"
        )
    reading.patches[parameter] = patch


def _spellings(model_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    spellings = {}
    for path in model_shapes:
        text_path = path.removeprefix("text_encoder.")
        if text_path != path:
            spellings["text_encoders.qwen3_06b.transformer.model." + text_path] = path
            spellings["lora_te_" + text_path.replace(".", "_")] = path
        else:
            spellings["diffusion_model." + path] = path
            spellings["lora_unet_" + path.replace(".", "_")] = path
    return spellings


def _patches(spelling: str, own: Mapping[str, Tensor]) -> Iterator[tuple[str, ComfyPatch, tuple[str, ...]]]:
    """(parameter, patch, the suffixes it reads)"""
    alpha = float(own["alpha"].flatten()[0]) if "alpha" in own else None
    scaled = ("alpha", "dora_scale")
    for up, down in _LOW_RANK:
        if up in own and down in own:
            yield "weight", ComfyPatch(spelling, "lora", _strength(alpha, own[down])), (up, down, *scaled)
    if all(suffix in own for suffix in _LOHA):
        yield "weight", ComfyPatch(spelling, "loha", _strength(alpha, own["hada_w1_b"])), (*_LOHA, *scaled)
    if _has_factor("lokr_w1", own) and _has_factor("lokr_w2", own):
        low_rank = own.get("lokr_w2_b", own.get("lokr_w1_b"))
        strength = 1.0 if low_rank is None else _strength(alpha, low_rank)
        yield "weight", ComfyPatch(spelling, "lokr", strength), (*_LOKR, *scaled)
    for suffix, parameter in (("w_norm", "weight"), ("b_norm", "bias"), ("diff", "weight"), ("diff_b", "bias")):
        if suffix in own:
            yield parameter, ComfyPatch(spelling, suffix, 1.0), (suffix,)


def _strength(alpha: float | None, ranked: Tensor) -> float:
    return 1.0 if alpha is None else alpha / ranked.shape[0]


def _has_factor(name: str, own: Mapping[str, Tensor]) -> bool:
    return name in own or (f"{name}_a" in own and f"{name}_b" in own)


def _value_problems(spelling: str, path: str, own: Mapping[str, Tensor], weight: tuple[int, ...]) -> Iterator[str]:
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in own.items()}
    alpha = own.get("alpha")
    if alpha is not None:
        if alpha.dtype != torch.float32 or alpha.ndim:
            yield f"{spelling}.alpha: {alpha.dtype} of shape {list(alpha.shape)} instead of one float32 number"
        value = float(alpha.flatten()[0])
        if not math.isfinite(value) or value >= 100_000:
            yield f"{spelling}.alpha: {value} stands for no strength"
        elif "lokr_w1" in own and "lokr_w2" in own and value != max(1, shapes["lokr_w2"][0] // shapes["lokr_w1"][0]):
            # One version of ComfyUI divides by this ratio of rows, the others take 1.
            yield f"{spelling}.alpha: {value} is not lokr_w2's rows // lokr_w1's, so the strength differs by version"
    if "dora_scale" in own and shapes["dora_scale"] != (weight[0], 1):
        yield f"{spelling}.dora_scale: shape {list(shapes['dora_scale'])} instead of {[weight[0], 1]}"
    for suffix in ("b_norm", "diff_b"):
        if suffix in own and not has_bias(path):
            yield f"{spelling}.{suffix}: the model has no such bias"
    product = _product_shape(shapes)
    if product is not None and product != weight:
        yield f"{spelling}: its tensors make a change of shape {list(product)}, the weight has {list(weight)}"


def _product_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of the change to the weight; None where there is none, or only a part of one."""
    for up, down in _LOW_RANK:
        if up in shapes and down in shapes:
            return _matrix_product(shapes[up], shapes[down])
    if all(suffix in shapes for suffix in _LOHA):
        first = _matrix_product(shapes["hada_w1_a"], shapes["hada_w1_b"])
        second = _matrix_product(shapes["hada_w2_a"], shapes["hada_w2_b"])
        return first if first == second else first + second
    if _has_factor("lokr_w1", shapes) and _has_factor("lokr_w2", shapes):
        w1, w2 = (
            shapes[name] if name in shapes else _matrix_product(shapes[f"{name}_a"], shapes[f"{name}_b"])
            for name in ("lokr_w1", "lokr_w2")
        )
        return (w1[0] * w2[0], w1[1] * w2[1]) if len(w1) == len(w2) == 2 else w1 + w2
    return shapes.get("w_norm", shapes.get("diff"))


def _matrix_product(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """[a, r] · [r, b] is [a, b]; factors that do not fit give both shapes, which is no weight's."""
    return (left[0], right[1]) if len(left) == len(right) == 2 and left[1] == right[0] else left + right
