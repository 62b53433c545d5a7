"""Adapters merged into a checkpoint, tensor by tensor: memory holds the adapters and little more than one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from library.anima_runtime.checkpoint import check_transformer_file, names_in_file
from library.anima_runtime.memory.quantised import StoredTensor, fold_scales
from library.anima_runtime.model_files import read_header
from library.errors import ModelFileError
from library.tensor_files import TensorSpec, write_tensors
from networks.adapter_files import load_adapter_file, read_adapter_file
from networks.adapter_types import Adapters, Shape, tensor_shapes, weight_shape
from networks.deltas import bias_delta_of
from networks.key_formats import resolve_norm_values
from networks.merging import changes_weight, merged_weight
from networks.module_names import TEXT_ENCODER


@dataclass(frozen=True)
class CheckpointMerge:
    """What is to be merged, found to fit. sources: adapters with their strengths, in the order they are applied.

    names: of the checkpoint's tensors by the model's ("blocks.0.mlp.layer1.weight").
    left_out: text-encoder modules, which no transformer file holds.
    """

    checkpoint: Path
    header: Mapping[str, StoredTensor]
    names: Mapping[str, str]
    sources: Sequence[tuple[Adapters, float]]
    left_out: tuple[str, ...]

    def write(self, file: Path, metadata: Mapping[str, str]) -> None:
        """Writes the checkpoint with its own names, shapes and number formats.

        Values are summed in float32 and rounded once; tensors without an adapter are copied bit by bit. Raises
        ModelFileError for a result that its number format cannot hold. Not atomic by itself.
        """
        model_names = {name: model_name for model_name, name in self.names.items()}
        specs = {name: TensorSpec(stored.shape, stored.dtype) for name, stored in self.header.items()}
        write_tensors(file, specs, lambda name: self._merged(name, model_names.get(name, "")), metadata)

    def _merged(self, name: str, model_name: str) -> Tensor:
        stored = _read_tensor(self.checkpoint, name)
        path, _, parameter = model_name.rpartition(".")
        parts = [(adapters[path], strength) for adapters, strength in self.sources if path in adapters]
        values = stored.float() if parts else stored
        for tensors, strength in parts:
            if parameter == "weight" and changes_weight(tensors):
                values = merged_weight(values, tensors, strength)
            elif parameter == "bias" and (bias := bias_delta_of(tensors)) is not None:
                values = values + strength * bias
        rounded = values.to(stored.dtype)
        if parts and stored.isfinite().all() and not rounded.isfinite().all():
            raise ModelFileError(f"{name}: the merged values are not finite in {stored.dtype}; lower the weights")
        return rounded


def plan_merge(checkpoint: Path, adapter_files: Sequence[tuple[Path, float]]) -> CheckpointMerge:
    """Reads the adapters and the checkpoint's header, and finds the place of everything.

    Raises ModelFileError for a file that is no whole Anima transformer or is quantised, and for adapters that do not
    fit it or change nothing in it.
    """
    check_transformer_file(checkpoint)
    header = read_header(checkpoint)
    _refuse_quantised(checkpoint, header)
    names = names_in_file(header)
    weights = {model_name: name for model_name, name in names.items() if model_name.endswith(".weight")}
    shapes = {model_name.removesuffix(".weight"): header[name].shape for model_name, name in weights.items()}
    sources, left_out = [], []
    for file, strength in adapter_files:
        text_encoder = _text_encoder_shapes(file)
        adapters, _ = load_adapter_file(file, shapes | text_encoder)
        left_out += text_encoder
        own = {path: tensors for path, tensors in adapters.items() if path not in text_encoder}
        if not own:
            raise ModelFileError(f"{file} changes the text encoder only, which {checkpoint} does not hold")
        own = resolve_norm_values(own, lambda path: _read_tensor(checkpoint, names[f"{path}.weight"]))
        sources.append((own, strength))
    return CheckpointMerge(checkpoint, header, names, sources, tuple(left_out))


def _text_encoder_shapes(file: Path) -> dict[str, Shape]:
    adapters = read_adapter_file(file)[0]
    return {
        path: weight_shape(path, tensor_shapes(tensors)) or ()
        for path, tensors in adapters.items()
        if path.startswith(TEXT_ENCODER)
    }


def _refuse_quantised(path: Path, header: Mapping[str, StoredTensor]) -> None:
    folded = fold_scales(path, header)
    eight_bit = [name for name in header if name not in folded or header[name].dtype.startswith("F8_")]
    if eight_bit:
        raise ModelFileError(
            f"{path} holds 8-bit weights ({eight_bit[0]}), whose steps are coarser than most adapters' changes; "
            "merge into the bfloat16 file"
        )


def _read_tensor(path: Path, name: str) -> Tensor:
    """The file is opened for each tensor: its pages stay in memory while it is open."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
