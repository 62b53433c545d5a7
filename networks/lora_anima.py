"""LoRA for Anima: the entry points a trainer of Kohya's kind calls on a network module."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from library.errors import SettingError
from networks.key_formats import from_comfy
from networks.lora import LoRA
from networks.network import AdapterNetwork
from networks.targets import find_targets

NETWORK_ARGUMENTS = ("target_modules", "train_llm_adapter")


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: Any,
) -> AdapterNetwork:
    """A new LoRA for the transformer `unet`; it still has to be attached with `apply_to`.

    network_dim: rank, default 4. network_alpha: default 1; 0 means the rank, as in Kohya's scripts.
    network_args: target_modules (see `networks.targets.find_targets`; a list or a comma string), train_llm_adapter.
    Raises SettingError for an unknown argument or a target that matches nothing.
    """
    _refuse_unknown(network_args)
    rank = 4 if network_dim is None else int(network_dim)
    if rank < 1:
        raise SettingError(f"network_dim: {rank} is not a rank; give 1 or more")
    alpha = float(1 if network_alpha is None else network_alpha) or float(rank)
    targets = find_targets(
        unet,
        _pattern_list(network_args.get("target_modules")),
        include_llm_adapter=_truth("train_llm_adapter", network_args.get("train_llm_adapter", True)),
    )
    dropout = neuron_dropout or 0.0
    adapters = {
        path: LoRA(linear.in_features, linear.out_features, rank, alpha, dropout) for path, linear in targets.items()
    }
    return AdapterNetwork(adapters, multiplier)


def create_network_from_weights(
    multiplier: float,
    file: str | Path,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    weights_sd: dict[str, Any] | None = None,
    for_inference: bool = False,
    **network_args: Any,
) -> tuple[AdapterNetwork, dict[str, Any]]:
    """The LoRA of a file: targets, ranks and alphas are the file's own, per module. Returns it with the tensors."""
    tensors = weights_sd if weights_sd is not None else load_file(file)
    adapters = {path: LoRA.from_tensors(own) for path, own in from_comfy(tensors, str(file)).items()}
    return AdapterNetwork(adapters, multiplier), tensors


def _pattern_list(value: Any) -> list[str] | None:
    if value is None:
        return None
    items = value.split(",") if isinstance(value, str) else value
    return [item.strip() for item in items if item.strip()] or None


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise SettingError(f"network_args {name}={value}: give true or false")


def _refuse_unknown(network_args: dict[str, Any]) -> None:
    for name in network_args:
        if name not in NETWORK_ARGUMENTS:
            near = difflib.get_close_matches(name, NETWORK_ARGUMENTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(NETWORK_ARGUMENTS)}"
            raise SettingError(f"network_args: networks.lora_anima has no argument {name!r}; {hint}")
