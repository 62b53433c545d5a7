"""What an adapter file holds, read module by module: types, strengths, sizes of its changes, and what is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import ModelFileError
from networks.adapter_files import AdapterFile, open_adapter_file
from networks.adapter_types import (
    NORM_VALUE,
    AdapterType,
    describe_adapters,
    infer_types,
    tensor_shapes,
    weight_shape,
)
from networks.comfyui_reader import check_comfyui_reads
from networks.deltas import adapter_of, bias_delta_of
from networks.merging import changes_weight
from networks.network import part_of

PARTS = ("transformer", "llm_adapter", "text_encoder")
# The number of a module's block, and the module's name within it.
BLOCK = re.compile(r"(?:llm_adapter\.|text_encoder\.)?(?:blocks|layers)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class ModuleReport:
    """strength: what the product of the factors is multiplied by; None where nothing is.

    norm: of ΔW (Frobenius; DoRA's before its rescaling), or of the bias's change where there is no ΔW; None where the
    base would be needed, or where it is not finite.
    """

    shape: tuple[int, ...] | None
    alpha: float | None
    strength: float | None
    norm: float | None
    changes_nothing: bool


@dataclass(frozen=True)
class AdapterReport:
    """modules, types: by path, of whole adapters only. problems: a line each; a healthy file has none."""

    file: str
    size: int
    format: str
    dtypes: tuple[str, ...]
    description: str
    types: Mapping[str, AdapterType]
    modules: Mapping[str, ModuleReport]
    problems: tuple[str, ...]
    metadata: Mapping[str, str]


def inspect_adapter(file: AdapterFile) -> AdapterReport:
    """Reads every tensor once, one module at a time."""
    problems = [f"{key}: belongs to no module of Anima" for key in file.unused]
    modules: dict[str, ModuleReport] = {}
    outlines: dict[str, dict[str, Tensor]] = {}
    for_comfyui = {key: torch.empty(0) for key in file.unused}
    for path in file.modules:
        tensors = file.read(path)
        for_comfyui |= {key: _outline(key, tensor) for key, tensor in tensors.items()}
        problems += [
            f"{key}: NaN or infinity" for key, tensor in tensors.items() if not tensor.float().isfinite().all()
        ]
        try:
            own = file.parse(path, tensors)
        except ModelFileError as error:
            problems.append(str(error))
            continue
        modules[path] = _measure(own)
        outlines[path] = {suffix: _outline(suffix, tensor) for suffix, tensor in own.items()}
    if modules and all(module.changes_nothing for module in modules.values()):
        problems.append("all modules are zero: the file changes nothing")
    shapes = {path: module.shape or () for path, module in modules.items()}
    problems += _comfyui_problems(for_comfyui, dict.fromkeys(file.modules, ()) | shapes)
    return AdapterReport(
        file=str(file.path),
        size=file.path.stat().st_size,
        format=file.format,
        dtypes=tuple(sorted({tensor.dtype for key, tensor in file.header.items() if not key.endswith("alpha")})),
        description=describe_adapters(outlines),
        types=infer_types(outlines),
        modules=modules,
        problems=tuple(problems),
        metadata=file.metadata,
    )


def norms_by_block(norms: Mapping[str, float]) -> dict[str, float]:
    """The norm of each block's changes together, in the blocks' order; "outside" for what is in no block."""
    squares: dict[tuple[int, int], float] = {}
    for path, norm in norms.items():
        match = BLOCK.fullmatch(path)
        block = PARTS.index(part_of(path)), int(match[1]) if match else -1
        squares[block] = squares.get(block, 0.0) + norm**2
    return {
        f"{PARTS[part]} {'outside' if number < 0 else number}": math.sqrt(square)
        for (part, number), square in sorted(squares.items())
    }


def health_of(path: Path) -> tuple[str, Sequence[str], dict[str, float]]:
    """Of an adapter file: what it holds in words, what is wrong with it, and how much it changes each block."""
    found = inspect_adapter(open_adapter_file(path, strict=False))
    norms = norms_by_block({name: module.norm or 0.0 for name, module in found.modules.items()})
    return found.description, found.problems, norms


def _outline(name: str, tensor: Tensor) -> Tensor:
    """The shape alone; of an alpha its value, as float32, since every reader takes one of any number format.

    An alpha of several numbers is a problem already told, and 1 here.
    """
    if not name.endswith("alpha"):
        return tensor.to("meta")
    return tensor.float().reshape(()) if tensor.numel() == 1 else torch.tensor(1.0)


def _measure(own: Mapping[str, Tensor]) -> ModuleReport:
    norm, strength = None, None
    if not changes_weight(own):
        norm = float(bias_delta_of(own).norm())
    elif "diff" in own:
        norm = float(own["diff"].double().norm())
    elif NORM_VALUE not in own:
        adapter = adapter_of(own).double()
        norm, strength = float(adapter.delta_norm()), getattr(adapter, "scale", None)
    bias = bias_delta_of(own)
    return ModuleReport(
        shape=weight_shape("the adapter", tensor_shapes(own)),
        alpha=_finite(float(own["alpha"])) if "alpha" in own else None,
        strength=_finite(strength),
        norm=_finite(norm),
        changes_nothing=norm == 0 and "dora_scale" not in own and (bias is None or not bias.any()),
    )


def _finite(value: float | None) -> float | None:
    """JSON knows neither NaN nor infinity."""
    return value if value is not None and math.isfinite(value) else None


def _comfyui_problems(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = [f"ComfyUI: {problem}" for problem in check_comfyui_reads(tensors, shapes)]
    if len([problem for problem in problems if problem.endswith("reads no such key")]) < len(tensors):
        return problems
    return ["ComfyUI reads none of the keys: convert the file with tools/convert_adapter.py --format comfy"]
