"""A network of adapters: attached to a model's Linears, trained, saved and loaded together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import ModelFileError
from library.files import write_atomically
from networks.key_formats import first_ten, from_comfy, to_comfy

logger = logging.getLogger(__name__)

LLM_ADAPTER_PREFIX = "llm_adapter."


class AdapterNetwork(nn.Module):
    """Adapters by the dotted path of the Linear each one changes.

    They are submodules under that same path, so `state_dict()` names a tensor
    "blocks.0.self_attn.q_proj.lora_down.weight", and `parameters()` is everything that trains.
    The model they are attached to is not owned: its parameters appear nowhere in this module.
    """

    def __init__(self, adapters: Mapping[str, nn.Module], multiplier: float = 1.0) -> None:
        super().__init__()
        self.adapters = dict(adapters)
        self.multiplier = multiplier
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for path, adapter in adapters.items():
            _add_under_path(self, path, adapter)

    # --- attachment ---

    def apply_to(
        self, text_encoder: Any, unet: nn.Module, apply_text_encoder: bool = False, apply_unet: bool = True
    ) -> None:
        """Attaches every adapter to its Linear of `unet`, the transformer; the name and order are Kohya's.

        From then on the Linear's output passes through the adapter. The Linear itself is not replaced.
        """
        modules = dict(unet.named_modules())
        missing = [path for path in self.adapters if path not in modules]
        if missing:
            raise ModelFileError(f"the model has no such module for the adapter: {first_ten(missing)}")
        for path, adapter in self.adapters.items():
            self._hooks.append(modules[path].register_forward_hook(self._hook(adapter)))

    def _hook(self, adapter: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def run_adapter(linear: nn.Module, inputs: tuple[Tensor, ...], base_output: Tensor) -> Tensor:
            if self.multiplier == 0:
                return base_output
            output = adapter(inputs[0], base_output)
            return output if self.multiplier == 1 else torch.lerp(base_output, output, self.multiplier)

        return run_adapter

    def detach(self) -> None:
        """Gives the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model runs without its adapters."""
        multiplier, self.multiplier = self.multiplier, 0.0
        try:
            yield
        finally:
            self.multiplier = multiplier

    # --- training ---

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, learning_rate: float
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the transformer's adapters, then the LLM adapter's; names for the logs."""
        rate = learning_rate if unet_lr is None else unet_lr
        parts: dict[str, list[nn.Parameter]] = {"transformer": [], "llm_adapter": []}
        for path, adapter in self.adapters.items():
            part = "llm_adapter" if path.startswith(LLM_ADAPTER_PREFIX) else "transformer"
            parts[part].extend(adapter.parameters())
        return [{"name": name, "lr": rate, "params": parameters} for name, parameters in parts.items() if parameters]

    @property
    def trains_llm_adapter(self) -> bool:
        return any(path.startswith(LLM_ADAPTER_PREFIX) for path in self.adapters)

    # --- files ---

    def export(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The adapter in ComfyUI's names, on the CPU; alpha stays float32 (100000 would be inf in fp16)."""
        tensors = to_comfy({path: adapter.tensors() for path, adapter in self.adapters.items()})
        return {
            key: tensor.to("cpu", torch.float32 if key.endswith(".alpha") else dtype or tensor.dtype).contiguous()
            for key, tensor in tensors.items()
        }

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        """Writes the adapter as safetensors; the file is complete under its name or not there."""
        tensors = self.export(dtype)
        write_atomically(Path(file), lambda path: save_file(tensors, path, metadata=metadata))

    def load_weights(self, file: str | Path) -> None:
        """Takes over an adapter file in ComfyUI's names; it must hold the very modules and shapes of this network.

        Raises ModelFileError naming the first ten missing, extra or mis-shaped tensors.
        """
        given = from_comfy(load_file(file), str(file))
        problems = list(self._differences(given))
        if problems:
            raise ModelFileError(f"{file} does not fit this network:\n  " + "\n  ".join(problems))
        for path, adapter in self.adapters.items():
            adapter.load_tensors(given[path])

    def _differences(self, given: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
        missing = [path for path in self.adapters if path not in given]
        extra = [path for path in given if path not in self.adapters]
        if missing:
            yield f"missing modules: {first_ten(missing)}"
        if extra:
            yield f"modules without an adapter here: {first_ten(extra)}"
        misfits = []
        for path in self.adapters.keys() & given.keys():
            own = {suffix: tuple(tensor.shape) for suffix, tensor in self.adapters[path].tensors().items()}
            theirs = {suffix: tuple(tensor.shape) for suffix, tensor in given[path].items()}
            own["alpha"] = theirs.get("alpha", own["alpha"])
            if {"alpha": own["alpha"], **theirs} != own:
                misfits.append(f"{path} has {theirs}, expected {own}")
        if misfits:
            yield f"mis-shaped: {first_ten(sorted(misfits))}"


def _add_under_path(root: nn.Module, path: str, module: nn.Module) -> None:
    """Registers `module` as root.<path>, with plain modules in between."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(name, module)
