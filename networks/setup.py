"""From the settings to a network that is built, attached, and proven to load where it will be used."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from library.errors import ModelFileError, SettingError, first_ten
from library.options import split_arguments
from networks.adapter_files import export_tensors, load_adapter_file, save_adapter_file
from networks.adapter_types import Adapters, AdapterType, infer_types
from networks.comfyui_reader import check_comfyui_reads
from networks.creation import create_network_from_weights, weight_shapes
from networks.key_formats import parse_keys, write_keys
from networks.module_names import module_names_covering
from networks.network import AdapterNetwork
from networks.settings import NetworkSettings

logger = logging.getLogger(__name__)

_OWN_MODULES = ("networks.lora_anima", "networks.lokr_anima", "networks.loha_anima")
# Settings that are also arguments of this project's own network modules.
_SETTINGS_AS_ARGUMENTS = ("train_norm", "train_llm_adapter", "llm_adapter_lr")

_PASSED = {"multiplier", "network_dim", "network_alpha", "vae", "text_encoder", "unet", "neuron_dropout"}


def import_network_module(name: str) -> ModuleType:
    """The module that network_module names. SettingError: there is none, or it builds no networks."""
    try:
        module = importlib.import_module(name)
    except (ImportError, ValueError) as error:
        hint = f"use one of {', '.join(_OWN_MODULES)}, or install the package it comes from"
        raise SettingError(f"network_module: {name!r} cannot be imported ({error}); {hint}") from error
    if not hasattr(module, "create_network"):
        raise SettingError(f"network_module: {name!r} has no create_network; use one of {', '.join(_OWN_MODULES)}")
    return module


def network_arguments(settings: NetworkSettings, given: Collection[str]) -> dict[str, str]:
    """network_args as a dictionary, with the settings that stand beside them.

    given: names of the settings that were set explicitly. SettingError: such a one and network_args contradict.
    """
    arguments = split_arguments("network_args", settings.network_args)
    if twice := sorted(_PASSED & arguments.keys()):
        raise SettingError(f"network_args: {', '.join(twice)} cannot stand here; dim, alpha, dropout are settings")
    if settings.network_module not in _OWN_MODULES:
        return arguments
    for name in _SETTINGS_AS_ARGUMENTS:
        value = getattr(settings, name)
        if name in arguments and name in given and arguments[name].lower() != str(value).lower():
            raise SettingError(f"{name} is {value}, but network_args says {name}={arguments[name]}: keep one of them")
        if name not in arguments and value is not None:
            arguments[name] = str(value)
    return arguments


def create_network(
    settings: NetworkSettings,
    module: ModuleType,
    arguments: Mapping[str, str],
    model: nn.Module,
    text_encoder: nn.Module,
) -> nn.Module:
    """A new network, not yet attached; made for models on the meta device it tells mistakes before any is loaded.

    Raises SettingError or ModelFileError for what the network module cannot do with this model.
    """
    if settings.dim_from_weights:
        network, _ = module.create_network_from_weights(
            1.0, settings.network_weights, None, text_encoder, model,
            allow_partial=settings.allow_partial_weights, **arguments,
        )  # fmt: skip
        return network
    return module.create_network(
        1.0, settings.network_dim, settings.network_alpha, None, text_encoder, model,
        neuron_dropout=settings.network_dropout, **arguments,
    )  # fmt: skip


def check_planned(
    settings: NetworkSettings, network: nn.Module, model: nn.Module, text_encoder: nn.Module, caches_text: bool
) -> None:
    """What settings ask of a network that it cannot give; the models may be on the meta device.

    Raises SettingError: a format that cannot hold it, cached text with an adapter on Qwen3, contradictory settings;
    ModelFileError: adapter files that do not fit.
    """
    for file in settings.base_weights:
        load_adapter_file(Path(file), weight_shapes(model, text_encoder), settings.allow_partial_weights)
    if isinstance(network, AdapterNetwork):
        if settings.network_weights is not None and not settings.dim_from_weights:
            network.read_weights(settings.network_weights, settings.allow_partial_weights)
        for file_format in settings.adapter_format:
            write_keys(network.adapter_tensors(), file_format)
    elif settings.adapter_format != ("comfy",):
        raise SettingError(f"adapter_format: a network of {settings.network_module} is saved as comfy only")
    if not trains_part(network, "text_encoder"):
        if settings.text_encoder_lr is not None:
            logger.warning("text_encoder_lr does nothing without network_args train_text_encoder=true")
        return
    if caches_text:
        raise SettingError(
            "cache_text_encoder_outputs: Qwen3's outputs change with train_text_encoder; drop one of them"
        )
    if settings.network_train_unet_only:
        raise SettingError("network_train_unet_only contradicts network_args train_text_encoder: drop one of them")


def attach_network(
    settings: NetworkSettings, network: nn.Module, model: nn.Module, text_encoder: nn.Module, device: torch.device
) -> None:
    """Merges base_weights into the model, loads network_weights, attaches the network and moves it, in float32."""
    for file, multiplier in zip_longest(settings.base_weights, settings.base_weights_multiplier, fillvalue=1.0):
        base, _ = create_network_from_weights(
            multiplier, file, None, text_encoder, model, allow_partial=settings.allow_partial_weights
        )
        base.merge_to(text_encoder, model)
        logger.info("merged %s into the model, multiplied by %g", Path(file).name, multiplier)
    if settings.network_weights is not None and not settings.dim_from_weights:
        network.load_weights(settings.network_weights, settings.allow_partial_weights)
    network.apply_to(text_encoder, model, trains_part(network, "text_encoder"), True)
    network.to(device, torch.float32)


def trains_part(network: nn.Module, part: str) -> bool:
    """Whether a network, of whatever module, changes "llm_adapter" or "text_encoder"."""
    if isinstance(network, AdapterNetwork):
        return network.trains(part)
    marks = {"llm_adapter": "llm_adapter", "text_encoder": "lora_te"}
    return any(marks[part] in name for name, _ in network.named_parameters())


@torch.no_grad()
def prove_loadable(network: nn.Module, formats: Collection[str], model: nn.Module, text_encoder: nn.Module) -> None:
    """Exports the network in memory as it will be saved, reads it as ComfyUI would, and loads it back.

    Raises ModelFileError naming what would be lost, before any time is spent on training; SettingError for a format
    that cannot hold this network.
    """
    shapes = weight_shapes(model, text_encoder)
    if not isinstance(network, AdapterNetwork):
        problems = check_comfyui_reads(export_tensors(outside_adapters(network), "comfy", None), shapes)
        if problems:
            raise ModelFileError(f"the adapter would not load in ComfyUI: {first_ten(problems)}")
        return
    for file_format in formats:
        tensors = network.export(file_format)
        problems = check_comfyui_reads(tensors, shapes)
        again, _ = create_network_from_weights(1.0, None, None, text_encoder, model, weights_sd=tensors)
        problems += _differences(network, again, exact=file_format != "diffusers")
        if problems:
            raise ModelFileError(f"the adapter would not load as it is in {file_format} form: {first_ten(problems)}")


def _differences(network: AdapterNetwork, again: AdapterNetwork, exact: bool) -> list[str]:
    """Modules that differ after a round trip; diffusers' form bakes alpha in, so there only deltas are compared."""
    problems = [f"{path} is lost" for path in network.adapters if path not in again.adapters]
    for path in network.adapters.keys() & again.adapters.keys():
        own, read = network.adapters[path], again.adapters[path]
        if exact:
            theirs = read.tensors()
            same = all(torch.equal(tensor.cpu(), theirs[suffix].cpu()) for suffix, tensor in own.tensors().items())
        else:
            same = own.weight_shape == read.weight_shape
        if not same:
            problems.append(f"{path} comes back changed")
    return problems


def save_network(
    network: nn.Module, file: Path, dtype: torch.dtype, metadata: dict[str, str] | None, file_format: str
) -> None:
    """Writes a network as an adapter file. One of an outside module is put into ComfyUI's names from its own."""
    if isinstance(network, AdapterNetwork):
        network.save_weights(file, dtype, metadata, file_format)
        return
    save_adapter_file(file, outside_adapters(network), file_format, dtype, metadata)


def outside_adapters(network: nn.Module) -> Adapters:
    """The adapters of an outside module's network, read from its state's names as those of a file would be."""
    tensors = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    parsed = parse_keys(tensors, {}, module_names_covering(tensors))
    if parsed.unused or not parsed.adapters:
        raise ModelFileError(f"tensors of the network that no adapter file can hold: {first_ten(parsed.unused)}")
    return parsed.adapters


def summary_table(network: nn.Module, groups: Collection[Mapping[str, Any]]) -> str:
    """What trains, one line for each parameter group: modules, their adapters, parameters, rate."""
    types = infer_types(network.adapter_tensors()) if isinstance(network, AdapterNetwork) else {}
    paths = {id(p): path for path in types for p in network.adapters[path].parameters()}
    lines = [f"{'group':<16}{'modules':>8}  {'parameters':>12}  {'rate':>8}  adapters"]
    for group in groups:
        own = {paths[id(parameter)] for parameter in group["params"] if id(parameter) in paths}
        kinds = Counter(_described(types[path]) for path in own)
        lines.append(
            f"{group.get('name', 'adapter'):<16}{len(own):>8}  {sum(p.numel() for p in group['params']):>12,}  "
            f"{group['lr']:>8.2g}  {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}"
        )
    return "\n".join(lines)


def _described(adapter: AdapterType) -> str:
    whole = " whole" if adapter.full_matrix else f" rank {adapter.rank}" if adapter.rank else ""
    return f"{adapter.kind}{whole}{' DoRA' if adapter.dora else ''}"
