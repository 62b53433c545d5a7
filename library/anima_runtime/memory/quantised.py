"""Model files with 8-bit weights: decoded exactly from their scales, or refused by name.

ComfyUI's files hold a weight as float8 values next to a float32 scale, `weight_scale` (or, older, `scale_weight`):
weight = values * scale, with one scale for the tensor or one for each row. `comfy_quant` names a layer's format as JSON
text, `scaled_fp8` marks a whole file, and the scales of a layer's input matter only to float8 matrix products.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from library.anima_runtime.file_kinds import describe_tensors
from library.errors import ModelFileError

# All formats that are not decoded here (nvfp4, mxfp8, int8, bitsandbytes, GPTQ, ...) store weights or scales otherwise.
_FLOAT_TYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SCALES = (".weight_scale", ".scale_weight")
_INPUT_SCALES = (".input_scale", ".scale_input")
_FORMAT = ".comfy_quant"
_FILE_MARKER = "scaled_fp8"
_READABLE_FORMATS = {"float8_e4m3fn", "float8_e5m2"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. dtype is spelled as in safetensors ("BF16"); values are to be multiplied by `scale`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: str | None = None


def fold_scales(path: Path, header: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights of a file, each with the name of its scale; the quantiser's own tensors are taken out.

    Raises ModelFileError naming the first tensor of a format that cannot be decoded exactly.
    """
    for name, tensor in header.items():
        if tensor.dtype not in _FLOAT_TYPES and not name.endswith(_FORMAT):
            raise _refusal(path, header, f"{name} ({tensor.dtype})")
    _check_formats(path, header)
    scales = [name for name in header if name.endswith(_SCALES) and _weight_name(name) in header]
    scale_of = {_weight_name(scale): scale for scale in scales}
    for weight, scale in scale_of.items():
        if header[scale].shape not in _scale_shapes(header[weight].shape):
            raise _refusal(path, header, f"{scale} of shape {list(header[scale].shape)}")
    folded = set(scale_of.values()) | {name for name in header if _is_marker(name, scale_of)}
    return {name: replace(tensor, scale=scale_of.get(name)) for name, tensor in header.items() if name not in folded}


def apply_scale(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight = values * scale in float32; scale holds one number, or one for each row of values."""
    rows = scale.float().reshape(-1, *[1] * (values.ndim - 1))
    return values.float() * rows


def _is_marker(name: str, scale_of: Mapping[str, str]) -> bool:
    if name == _FILE_MARKER or name.endswith((f".{_FILE_MARKER}", _FORMAT)):
        return True
    return name.endswith(_INPUT_SCALES) and _weight_name(name) in scale_of


def _weight_name(part: str) -> str:
    return f"{part.rpartition('.')[0]}.weight"


def _scale_shapes(weight: tuple[int, ...]) -> set[tuple[int, ...]]:
    rows = weight[:1]
    return {(), (1,), (1, 1), rows, (*rows, *[1] * (len(weight) - 1))}


def _check_formats(path: Path, header: Mapping[str, StoredTensor]) -> None:
    names = [name for name in header if name.endswith(_FORMAT)]
    if not names:
        return
    with safe_open(path, framework="pt") as file:
        for name in names:
            try:
                layer_format = json.loads(bytes(file.get_tensor(name).tolist()))["format"]
            except (ValueError, KeyError, TypeError) as error:
                raise _refusal(path, header, name) from error
            if layer_format not in _READABLE_FORMATS:
                raise _refusal(path, header, f"{name} ({layer_format})")


def _refusal(path: Path, header: Mapping[str, StoredTensor], tensor: str) -> ModelFileError:
    return ModelFileError(
        f"{path} (it looks like {describe_tensors(header)}) cannot be decoded exactly: {tensor}. "
        "Use the bfloat16 file, or a float8 one with scales."
    )
