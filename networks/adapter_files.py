"""Reading adapter files, of which nothing is dropped silently, and the tensors of one to be written."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from library.anima_runtime.file_kinds import describe_tensors
from library.anima_runtime.memory.quantised import StoredTensor
from library.anima_runtime.model_files import read_header
from library.errors import ModelFileError, first_ten
from library.tensor_files import DTYPES
from networks.adapter_types import Adapters, Shape, describe_adapters, weight_shape
from networks.key_formats import FileKey, ParsedAdapter, find_keys, parse_keys, write_keys
from networks.module_names import depth_of_keys, has_bias, module_names_covering
from networks.peft_alphas import HEADER_KEY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file, of which the header has been read, and modules are when they are asked for.

    keys: what belongs to which module, by the tensors' names in the file.
    """

    path: Path
    header: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    peft_config: Mapping[str, Any] | None
    keys: Mapping[str, FileKey]

    @cached_property
    def modules(self) -> dict[str, dict[str, str]]:
        """{module path: {suffix: the tensor's name in the file}}"""
        modules: dict[str, dict[str, str]] = {}
        for key, file_key in self.keys.items():
            modules.setdefault(file_key.path, {})[file_key.suffix] = key
        return modules

    @property
    def unused(self) -> list[str]:
        """Names of tensors that belong to no module."""
        return [key for key in self.header if key not in self.keys]

    @property
    def format(self) -> str:
        """Whose spelling the file has."""
        return " and ".join(sorted({key.format for key in self.keys.values()}))

    @property
    def own_metadata(self) -> dict[str, str]:
        """For a file that is made of this one: without PEFT's settings, which are in the alphas by then."""
        return _without_peft_settings(self.metadata)

    def read(self, module: str) -> dict[str, Tensor]:
        """One module's tensors by their names in the file. Its pages stay in memory while it is open: once for each."""
        with safe_open(self.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in self.modules[module].values()}

    def parse(self, module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `read` gave by suffix, alpha with it. Raises ModelFileError where that is no whole adapter."""
        return parse_keys(tensors, self.metadata, [module], self.peft_config).adapters[module]

    def module(self, module: str) -> dict[str, Tensor]:
        """One module's tensors by suffix; see `parse`."""
        return self.parse(module, self.read(module))


def open_adapter_file(path: Path, strict: bool = True) -> AdapterFile:
    """An adapter without its model: modules are known by Anima's names alone.

    Raises ModelFileError for a file that is no adapter, or of a type that nobody here reads. strict: also for keys that
    belong to no module of any Anima, and for modules that are not whole; alphas are read for that.
    """
    header = read_header(path)
    with _errors_naming(str(path)):
        keys = find_keys(header, module_names_covering(header))
    file = AdapterFile(path, header, read_metadata(path), read_peft_config(path), keys)
    if not keys or (strict and file.unused):
        raise ModelFileError(f"{path} looks like {describe_tensors(header)}. {_unused_text(len(header), file.unused)}")
    if strict:
        _check_whole(file)
    return file


def _check_whole(file: AdapterFile) -> None:
    unknown = [f"{key} ({stored.dtype})" for key, stored in file.header.items() if stored.dtype not in DTYPES]
    if unknown:
        raise ModelFileError(f"{file.path} holds number formats that are not known here: {first_ten(unknown)}")
    outline = {key: torch.empty(stored.shape, device="meta") for key, stored in file.header.items()}
    with safe_open(file.path, framework="pt") as opened:
        outline |= {key: opened.get_tensor(key) for key in outline if key.endswith(".alpha")}
    with _errors_naming(str(file.path)):
        parse_keys(outline, file.metadata, file.modules, file.peft_config)


def read_adapter_file(path: Path) -> tuple[Adapters, dict[str, str]]:
    """A whole adapter without its model, and the file's metadata; see `open_adapter_file` for the errors."""
    opened = open_adapter_file(path)
    return {module: opened.module(module) for module in opened.modules}, opened.own_metadata


def load_adapter_file(
    path: Path, model_shapes: Mapping[str, Shape], allow_partial: bool = False
) -> tuple[Adapters, dict[str, str]]:
    """An adapter for a model, checked against it from the file's header alone, and the file's metadata.

    model_shapes: weight shape by module path, norms included; text-encoder modules after "text_encoder.".
    allow_partial: leaves out, with a warning, what does not fit; otherwise that is an error.
    Raises ModelFileError listing the first ten keys that do not fit, naming the depth where that differs.
    """
    shapes = {key: tensor.shape for key, tensor in read_header(path).items()}
    fitting = _fitting_keys(str(path), shapes, read_metadata(path), model_shapes, allow_partial)
    parsed, metadata = _read(path, fitting, model_shapes)
    logger.info("%s: %s, names as %s", path, describe_adapters(parsed.adapters), parsed.format)
    return parsed.adapters, metadata


def fit_adapter_tensors(
    tensors: Mapping[str, Tensor], model_shapes: Mapping[str, Shape], allow_partial: bool = False
) -> Adapters:
    """As `load_adapter_file`, for a file's tensors that are in memory already."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    fitting = _fitting_keys("the adapter", shapes, {}, model_shapes, allow_partial)
    return parse_keys({key: tensors[key] for key in fitting}, {}, model_shapes).adapters


def _fitting_keys(
    source: str,
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    model_shapes: Mapping[str, Shape],
    allow_partial: bool,
) -> list[str]:
    with _errors_naming(source):
        found = find_keys(shapes, model_shapes)
        misfits = dict(_misfits(shapes, found, model_shapes))
    unused = [key for key in shapes if key not in found]
    fitting = [key for key, file_key in found.items() if file_key.path not in misfits]
    problems = _depth_problems(metadata, shapes, model_shapes)
    if unused:
        problems.append(_unused_text(len(shapes), unused))
    if misfits:
        problems.append(f"tensors of another shape in {len(misfits)} modules: {first_ten(misfits.values(), '; ')}")
    if not fitting:
        problems.append(f"it looks like {describe_tensors(shapes)}")
    if not fitting or (problems and not allow_partial):
        hint = " (allow_partial_weights uses what fits)" if fitting else ""
        raise ModelFileError(f"{source} does not fit this model{hint}:\n  " + "\n  ".join(problems))
    if problems:
        logger.warning("%s fits this model in part; the rest is left out:\n  %s", source, "\n  ".join(problems))
    return fitting


def _misfits(
    file_shapes: Mapping[str, Shape], found: Mapping[str, FileKey], model_shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, str]]:
    """(module path, what is wrong) of the modules whose tensors are for another shape than the model's."""
    modules: dict[str, dict[str, Shape]] = {}
    for key, file_key in found.items():
        modules.setdefault(file_key.path, {})[file_key.suffix] = file_shapes[key]
    for path, shapes in modules.items():
        weight, expected = weight_shape(path, shapes), tuple(model_shapes[path])
        bias = shapes.get("b_norm", shapes.get("diff_b"))
        if weight is not None and weight != expected:
            yield path, f"{path} is for {list(weight)}, the model has {list(expected)}"
        elif bias is not None and not (has_bias(path) and bias == expected[:1]):
            yield path, f"{path} is for a bias of {list(bias)}, which the model has not"


def _depth_problems(metadata: Mapping[str, str], keys: Iterable[str], model_shapes: Mapping[str, Shape]) -> list[str]:
    own_depth, least_depth = depth_of_keys(model_shapes), depth_of_keys(keys)
    recorded = metadata.get("ss_anima_depth", "")
    if recorded.isdecimal() and int(recorded) != own_depth:
        return [f"it was trained for {recorded} blocks, this model has {own_depth}"]
    if least_depth > own_depth:
        return [f"it was trained for {least_depth} blocks or more, this model has {own_depth}"]
    return []


def _unused_text(total: int, unused: Collection[str]) -> str:
    return f"{len(unused)} of {total} keys belong to no module: {first_ten(unused)}"


def _read(path: Path, keys: Iterable[str], module_names: Iterable[str]) -> tuple[ParsedAdapter, dict[str, str]]:
    """The header's PEFT settings are taken into the alphas, so the metadata returned is without them."""
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in keys}
    with _errors_naming(str(path)):
        parsed = parse_keys(tensors, metadata, module_names, read_peft_config(path))
    return parsed, _without_peft_settings(metadata)


def _without_peft_settings(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != HEADER_KEY}


@contextmanager
def _errors_naming(source: str) -> Iterator[None]:
    try:
        yield
    except ModelFileError as error:
        raise ModelFileError(f"{source}: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def read_peft_config(path: Path) -> dict[str, Any] | None:
    """PEFT's settings of an adapter file, which stand in adapter_config.json beside it; None without that file."""
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
    overflowed = converted.isinf()
    if overflowed.any() and (overflowed & tensor.cpu().isfinite()).any():
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise ModelFileError(f"{key} has values up to {largest:.3g}, too large for {dtype}; save as bf16 or float.")
    return converted
