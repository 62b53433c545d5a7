"""A network of adapters: attached to a model's modules, trained, saved and loaded together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.adapter_writing import write_adapter
from library.errors import ModelFileError, SettingError, first_ten
from networks.adapter import Adapter
from networks.adapter_files import export_tensors, load_adapter_file
from networks.adapter_types import Adapters, tensor_shapes
from networks.arguments import NO_ARGUMENTS, NetworkArguments, by_pattern
from networks.module_names import LLM_ADAPTER, TEXT_ENCODER
from networks.norm import NormDelta
from networks.patterns import value_for
from networks.targets import named_modules

# Other trainers save alphas in bf16 as well, which keeps 8 bits.
_ALPHA_ROUNDING = 2**-8


class AdapterNetwork(nn.Module):
    """Adapters by the dotted path of the module each one changes.

    They are submodules under that same path, so `state_dict()` names a tensor
    "blocks.0.self_attn.q_proj.lora_down.weight", and `parameters()` is everything that trains.
    The model they are attached to is not owned: its parameters appear nowhere in this module.
    """

    def __init__(
        self, adapters: Mapping[str, Adapter], multiplier: float = 1.0, arguments: NetworkArguments = NO_ARGUMENTS
    ) -> None:
        super().__init__()
        self.adapters = dict(adapters)
        self.multiplier = multiplier
        self.arguments = arguments
        self._parts = {part_of(path) for path in adapters}  # each step asks for them
        for path, adapter in adapters.items():
            _add_under_path(self, path, adapter)

    # --- attachment ---

    def apply_to(
        self, text_encoder: nn.Module | None, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Attaches every adapter to its module of `unet`, the transformer, or of Qwen3; name and order are Kohya's.

        From then on the module's output passes through the adapter. The module itself is not replaced.
        """
        modules = named_modules(unet, text_encoder)
        missing = [path for path in self.adapters if path not in modules]
        if missing:
            raise ModelFileError(f"the model has no such module for the adapter: {first_ten(missing)}")
        for path, adapter in self.adapters.items():
            if apply_text_encoder if path.startswith(TEXT_ENCODER) else apply_unet:
                modules[path].register_forward_hook(self._hook(adapter))

    def _hook(self, adapter: Adapter) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def run_adapter(module: nn.Module, inputs: tuple[Tensor, ...], base_output: Tensor) -> Tensor:
            if self.multiplier == 0:
                return base_output
            output = adapter(inputs[0], base_output)
            return output if self.multiplier == 1 else torch.lerp(base_output, output, self.multiplier)

        return run_adapter

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model runs without its adapters."""
        multiplier, self.multiplier = self.multiplier, 0.0
        try:
            yield
        finally:
            self.multiplier = multiplier

    @torch.no_grad()
    def merge_to(self, text_encoder: nn.Module | None, unet: nn.Module, *_: Any) -> None:
        """Adds the adapters to the model's weights for good: summed in float32 and rounded once."""
        modules = named_modules(unet, text_encoder)
        for path, adapter in self.adapters.items():
            weight = modules[path].weight
            original = weight.float()
            merged = adapter.to(weight.device).merged(original)
            weight.copy_(torch.lerp(original, merged, self.multiplier))

    # --- training ---

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, learning_rate: float
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with names for the curves; each rate as far as given, else learning_rate.

        A group holds the parameters of one part (transformer, llm_adapter, text_encoder) that learn at one rate:
        network_reg_lrs and loraplus_lr_ratio make more of them. What would learn at rate 0 is frozen.
        Raises SettingError when nothing is left to train.
        """
        rates = {
            "transformer": unet_lr,
            "llm_adapter": unet_lr if self.arguments.llm_adapter_lr is None else self.arguments.llm_adapter_lr,
            "text_encoder": text_encoder_lr,
        }
        own_rates = by_pattern("network_reg_lrs", self.arguments.network_reg_lrs, float)
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}
        for path, adapter in self.adapters.items():
            part = part_of(path)
            base = learning_rate if rates[part] is None else rates[part]
            rate = value_for(path, own_rates, base)
            for name, parameter in adapter.named_parameters():
                faster = self.arguments.loraplus_lr_ratio if name in adapter.output_side else None
                parameter.requires_grad_(rate > 0)
                if rate > 0:
                    groups.setdefault((part, rate * (faster or 1.0)), []).append(parameter)
        if not groups:
            raise SettingError("learning_rate: every part of the adapter would learn at rate 0")
        return [
            {"name": name, "lr": rate, "params": parameters} for (name, rate), parameters in numbered(groups).items()
        ]

    def paths(self) -> dict[int, str]:
        """{id of a parameter: path of the module it changes}"""
        return {id(parameter): path for path, adapter in self.adapters.items() for parameter in adapter.parameters()}

    def adapts(self, part: str) -> bool:
        """Whether any adapter belongs to "transformer", "llm_adapter" or "text_encoder", whether or not it learns."""
        return part in self._parts

    @torch.no_grad()
    def apply_max_norm(self, limit: float) -> None:
        """Shrinks every Linear's delta that is longer than `limit` (Frobenius norm) to it; nothing is read back."""
        for adapter in self.adapters.values():
            if not isinstance(adapter, NormDelta):
                adapter.limit_norm(limit)

    # --- files ---

    def adapter_tensors(self) -> Adapters:
        """{module path: {suffix: tensor}}, as it is now."""
        return {path: adapter.tensors() for path, adapter in self.adapters.items()}

    def export(self, file_format: str = "comfy") -> dict[str, Tensor]:
        """The tensors of a file of that format, float32 on the CPU."""
        return export_tensors(self.adapter_tensors(), file_format, None)

    def save_weights(
        self,
        file: str | Path,
        dtype: torch.dtype | None,
        metadata: dict[str, str] | None,
        file_format: str = "comfy",
    ) -> None:
        """Writes the adapter as a run does: the file has been read back, and is complete under its name or not there.

        The name is Kohya's. dtype: None keeps float32; see `export_tensors`.
        """
        write_adapter(Path(file), export_tensors(self.adapter_tensors(), file_format, dtype), metadata)

    def load_weights(self, file: str | Path, allow_partial: bool = False) -> None:
        """Takes over an adapter file of any readable format, see `read_weights`. What the file lacks stays as it is."""
        for path, tensors in self.read_weights(file, allow_partial).items():
            self.adapters[path].load_tensors(tensors)

    def read_weights(self, file: str | Path, allow_partial: bool = False) -> Adapters:
        """An adapter file that fits this network.

        Raises ModelFileError naming what of the file does not fit: modules, tensors of other shapes, or an alpha other
        than the network's. With allow_partial modules without a place are left out with a warning.
        """
        shapes = {path: adapter.weight_shape for path, adapter in self.adapters.items()}
        given, _ = load_adapter_file(Path(file), shapes, allow_partial)
        own = self.adapter_tensors()
        if misfits := [problem for path in given if (problem := misfit(path, given[path], own[path]))]:
            raise ModelFileError(
                f"{file} does not fit this network (dim_from_weights builds one that it fits): {first_ten(misfits)}"
            )
        return given


def misfit(path: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """What of a file's tensors for the module at `path` does not fit the network's own, if anything."""
    if tensor_shapes(given) != tensor_shapes(own):
        return f"{path} has {tensor_shapes(given)}, expected {tensor_shapes(own)}"
    if "alpha" in own:
        theirs, ours = float(given["alpha"]), float(own["alpha"])
        if not math.isclose(theirs, ours, rel_tol=_ALPHA_ROUNDING):
            return f"{path} has alpha {theirs:g}, the network {ours:g}: set network_alpha"
    return None


def part_of(path: str) -> str:
    """Which part of the model a module path belongs to: "transformer", "llm_adapter" or "text_encoder"."""
    if path.startswith(TEXT_ENCODER):
        return "text_encoder"
    return "llm_adapter" if path.startswith(LLM_ADAPTER) else "transformer"


def numbered(groups: Mapping[tuple[str, float], list[nn.Parameter]]) -> dict[tuple[str, float], list[nn.Parameter]]:
    """Group names made unique: the second of "transformer" is "transformer_2"."""
    seen: dict[str, int] = {}
    named = {}
    for (part, rate), parameters in groups.items():
        seen[part] = seen.get(part, 0) + 1
        named[part if seen[part] == 1 else f"{part}_{seen[part]}", rate] = parameters
    return named


def _add_under_path(root: nn.Module, path: str, module: nn.Module) -> None:
    """Registers `module` as root.<path>, with plain modules in between."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(name, module)
