"""Reading and writing adapter files. Nothing of a file is dropped silently; a written file is whole or not there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from library.anima_runtime.model_files import read_header
from library.errors import ModelFileError, first_ten
from library.files import write_atomically
from networks.adapter_types import Adapters, Shape, describe_adapters, weight_shape
from networks.key_formats import ParsedAdapter, find_keys, parse_keys, write_keys
from networks.module_names import depth_of_keys, module_names_covering
from networks.peft_alphas import HEADER_KEY

logger = logging.getLogger(__name__)


def read_adapter_file(path: Path) -> tuple[ParsedAdapter, dict[str, str]]:
    """An adapter without its model, and the file's metadata: modules are known by Anima's names alone.

    Raises ModelFileError where the file holds keys that are no module of any Anima.
    """
    header = read_header(path)
    parsed, metadata = _read(path, header, module_names_covering(header))
    if parsed.unused or not parsed.adapters:
        raise ModelFileError(f"{path}: {_unused_text(len(header), parsed.unused)}")
    return parsed, metadata


def load_adapter_file(
    path: Path, model_shapes: Mapping[str, Shape], allow_partial: bool = False
) -> tuple[Adapters, dict[str, str]]:
    """An adapter for a model, checked against it from the file's header alone, and the file's metadata.

    model_shapes: weight shape by module path, norms included; text-encoder modules after "text_encoder.".
    allow_partial: leaves out, with a warning, what does not fit; otherwise that is an error.
    Raises ModelFileError listing the first ten keys that do not fit, naming the depth where that differs.
    """
    header = read_header(path)
    with _errors_naming(path):
        found = find_keys(header, model_shapes)
        modules: dict[str, dict[str, Shape]] = {}
        for key, file_key in found.items():
            modules.setdefault(file_key.path, {})[file_key.suffix] = header[key].shape
        misfits = dict(_misfits(modules, model_shapes))
    unused = [key for key in header if key not in found]
    problems = _problems(path, header, unused, misfits, model_shapes)
    fitting = [key for key, file_key in found.items() if file_key.path not in misfits]
    if not fitting or (problems and not allow_partial):
        problems = problems or [_unused_text(len(header), unused)]
        raise ModelFileError(f"{path} does not fit this model:\n  " + "\n  ".join(problems))
    if problems:
        logger.warning("%s fits this model in part; the rest is left out:\n  %s", path, "\n  ".join(problems))
    parsed, metadata = _read(path, fitting, model_shapes)
    logger.info("%s: %s, names as %s", path, describe_adapters(parsed.adapters), parsed.format)
    return parsed.adapters, metadata


def _misfits(
    modules: Mapping[str, Mapping[str, Shape]], model_shapes: Mapping[str, Shape]
) -> Iterable[tuple[str, str]]:
    for path, shapes in modules.items():
        shape, expected = weight_shape(path, shapes), tuple(model_shapes[path])
        if shape != expected and not ("diff_b" in shapes and shape == expected[:1]):
            yield path, f"{path} is for {list(shape)}, the model has {list(expected)}"


def _problems(
    path: Path,
    header: Mapping[str, Any],
    unused: list[str],
    misfits: Mapping[str, str],
    model_shapes: Mapping[str, Shape],
) -> list[str]:
    problems = []
    own_depth, file_depth = depth_of_keys(model_shapes), depth_of_keys(header)
    recorded = _metadata(path).get("ss_anima_depth", "")
    trained = int(recorded) if recorded.isdecimal() else None
    if trained is not None and trained != own_depth:
        problems.append(f"it was trained for {trained} blocks, this model has {own_depth}")
    elif file_depth > own_depth:
        problems.append(f"it was trained for {file_depth} blocks or more, this model has {own_depth}")
    if unused:
        problems.append(_unused_text(len(header), unused))
    if misfits:
        problems.append(f"tensors of another shape in {len(misfits)} modules: {first_ten(misfits.values(), '; ')}")
    return problems


def _unused_text(total: int, unused: Iterable[str]) -> str:
    listed = list(unused)
    if not total:
        return "the file is empty"
    return f"{len(listed)} of {total} keys belong to no module: {first_ten(listed)}"


def _read(path: Path, keys: Iterable[str], module_names: Iterable[str]) -> tuple[ParsedAdapter, dict[str, str]]:
    """The header's PEFT settings are taken into the alphas, so the metadata returned is without them."""
    metadata = _metadata(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in keys}
    with _errors_naming(path):
        parsed = parse_keys(tensors, metadata, module_names, _peft_config(path))
    return parsed, {key: value for key, value in metadata.items() if key != HEADER_KEY}


@contextmanager
def _errors_naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _peft_config(path: Path) -> dict[str, Any] | None:
    file = path.parent / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{file}, which tells the alphas of {path.name}, is not JSON: {error}") from error


def export_tensors(
    adapters: Mapping[str, Mapping[str, Tensor]], file_format: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """A file's tensors by key, on the CPU and contiguous. dtype: None keeps each tensor's; alpha is always float32.

    Raises ModelFileError naming the first tensor whose values are too large for dtype; else see `write_keys`.
    """
    return {
        key: tensor.cpu().contiguous() if key.endswith(".alpha") or dtype is None else _converted(key, tensor, dtype)
        for key, tensor in write_keys(adapters, file_format).items()
    }


def _converted(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    converted = tensor.to("cpu", dtype).contiguous()
    if converted is not tensor and converted.isinf().sum() > tensor.isinf().sum():
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise ModelFileError(f"{key} has values up to {largest:.3g}, too large for {dtype}; save as bf16 or float.")
    return converted


def save_adapter_file(
    path: Path,
    adapters: Mapping[str, Mapping[str, Tensor]],
    file_format: str,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
) -> None:
    """Writes an adapter as safetensors; see `export_tensors` for dtype and errors."""
    tensors = export_tensors(adapters, file_format, dtype)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=dict(metadata or {}) or None))
