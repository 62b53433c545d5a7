"""From the settings to a network that is built, attached, and proven to load where it will be used."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from library.errors import ModelFileError, SettingError, first_ten
from library.options import key_values
from networks.adapter_files import fit_adapter_tensors, load_adapter_file
from networks.adapter_types import Adapters, AdapterType, infer_types
from networks.arguments import read_arguments
from networks.comfyui_reader import check_comfyui_reads
from networks.creation import WHOLE_MATRIX_RANK, create_network_from_weights, weight_shapes
from networks.key_formats import write_keys
from networks.network import AdapterNetwork
from networks.outside import LYCORIS, OutsideNetwork, check_outside_settings, create_outside_network
from networks.settings import NetworkSettings

logger = logging.getLogger(__name__)

Network = AdapterNetwork | OutsideNetwork

# This project's own, with the adapters they make.
_OWN_MODULES = {"networks.lora_anima": "lora", "networks.lokr_anima": "lokr", "networks.loha_anima": "loha"}
# Settings that are also arguments of this project's own network modules.
_SETTINGS_AS_ARGUMENTS = ("train_norm", "train_llm_adapter", "llm_adapter_lr")
# What the trainer itself passes to create_network.
_PASSED = {"multiplier", "network_dim", "network_alpha", "vae", "text_encoder", "unet", "neuron_dropout"}


def import_network_module(name: str) -> ModuleType:
    """The module that network_module names. SettingError: there is none, or it builds no networks."""
    try:
        module = importlib.import_module(name)
    except (ImportError, ValueError) as error:
        package = "install the package it comes from"
        if name == LYCORIS and isinstance(error, ModuleNotFoundError):
            package = "pip install lycoris-lora"
        hint = f"use one of {', '.join(_OWN_MODULES)}, or {package}"
        raise SettingError(f"network_module: {name!r} cannot be imported ({error}); {hint}") from error
    if not hasattr(module, "create_network"):
        raise SettingError(f"network_module: {name!r} has no create_network; use one of {', '.join(_OWN_MODULES)}")
    return module


def network_arguments(settings: NetworkSettings, given: Collection[str]) -> dict[str, str]:
    """network_args as a dictionary, with the settings that stand beside them.

    given: names of the settings that were set explicitly. SettingError, with all that is wrong: an argument that is
    none, or contradicts such a setting; or the network module is another package's and has no such setting.
    """
    problems: list[str] = []
    arguments = key_values("network_args", settings.network_args, problems)
    if twice := sorted(_PASSED & arguments.keys()):
        problems.append(f"network_args: {', '.join(twice)} cannot stand here; dim, alpha, dropout are settings")
    if settings.network_module not in _OWN_MODULES:
        _raise(problems)
        if unknown := sorted(set(_SETTINGS_AS_ARGUMENTS) & set(given)):
            raise SettingError(
                f"{', '.join(unknown)}: for this project's network modules only; put what {settings.network_module} "
                "has of the kind into network_args"
            )
        check_outside_settings(settings, arguments)
        return arguments
    try:
        adapter_type = None if settings.dim_from_weights else _OWN_MODULES[settings.network_module]
        read_arguments({name: text for name, text in arguments.items() if name not in _PASSED}, adapter_type)
    except SettingError as error:
        problems.append(str(error))
    for name in _SETTINGS_AS_ARGUMENTS:
        value = getattr(settings, name)
        if name in arguments and name in given and arguments[name].lower() != str(value).lower():
            problems.append(f"{name} is {value}, but network_args says {name}={arguments[name]}: keep one of them")
        if name not in arguments and value is not None:
            arguments[name] = str(value)
    _raise(problems)
    return arguments


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise SettingError("\n".join(problems))


def create_network(
    settings: NetworkSettings,
    module: ModuleType,
    arguments: Mapping[str, str],
    model: nn.Module,
    text_encoder: nn.Module,
) -> Network:
    """A new network, not yet attached.

    Raises SettingError or ModelFileError for what the network module cannot do with this model.
    """
    if settings.network_module not in _OWN_MODULES:
        return create_outside_network(settings, module, arguments, model, text_encoder)
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


def may_change_text_encoder(settings: NetworkSettings) -> bool:
    """Whether the network, or what it begins with, may belong to the text encoder, as far as settings alone tell.

    Where not, any module can stand for it.
    """
    asked = any(entry.partition("=")[0].strip() == "train_text_encoder" for entry in settings.network_args)
    is_own = settings.network_module in _OWN_MODULES
    return asked or not is_own or settings.network_weights is not None or bool(settings.base_weights)


def missing_adapter_files(settings: NetworkSettings) -> list[Path]:
    """The adapter files to start from that are not there."""
    weights = [] if settings.network_weights is None else [settings.network_weights]
    return [file for file in (*weights, *settings.base_weights) if not file.is_file()]


def check_planned(
    settings: NetworkSettings,
    module: ModuleType,
    arguments: Mapping[str, str],
    model: nn.Module,
    text_encoder: nn.Module,
    caches_text: bool,
) -> Network | None:
    """Makes the network for models on the meta device, and tells mistakes before any model is loaded.

    A network of another package may read the model's weights, so it can only be made, and checked, once they are there:
    None is returned for it.
    Raises what `create_network` and `check_network` raise; ModelFileError for adapter files that do not fit.
    """
    for file in settings.base_weights:
        load_adapter_file(file, weight_shapes(model, text_encoder), settings.allow_partial_weights)
    if settings.network_module not in _OWN_MODULES:
        return None
    network = create_network(settings, module, arguments, model, text_encoder)
    if settings.network_dim >= WHOLE_MATRIX_RANK and not settings.dim_from_weights:
        logger.info("network_dim %d: LoKr with whole matrices", settings.network_dim)
    if settings.network_weights is not None and not settings.dim_from_weights:
        network.read_weights(settings.network_weights, settings.allow_partial_weights)
    if settings.text_encoder_lr is not None and not network.adapts("text_encoder"):
        logger.warning("text_encoder_lr does nothing without network_args train_text_encoder=true")
    check_network(settings, network, caches_text)
    return network


def check_network(settings: NetworkSettings, network: Network, caches_text: bool) -> None:
    """What settings ask of a network that it cannot give.

    Raises SettingError: a format that cannot hold it, cached text with an adapter on Qwen3, contradictory settings.
    """
    for file_format in settings.adapter_format:
        write_keys(network.adapter_tensors(), file_format)
    if not network.adapts("text_encoder"):
        return
    if caches_text:
        raise SettingError(
            "cache_text_encoder_outputs: Qwen3 has adapters, by train_text_encoder or dim_from_weights, at whatever "
            "rate; drop one of them"
        )
    if settings.network_train_unet_only:
        raise SettingError("network_train_unet_only contradicts network_args train_text_encoder: drop one of them")


def merge_base_weights(settings: NetworkSettings, model: nn.Module, text_encoder: nn.Module) -> None:
    """Merges base_weights into the model, before a network is made for it: DoRA starts from the weights it finds."""
    for file, multiplier in zip_longest(settings.base_weights, settings.base_weights_multiplier, fillvalue=1.0):
        base, _ = create_network_from_weights(
            multiplier, file, None, text_encoder, model, allow_partial=settings.allow_partial_weights
        )
        base.merge_to(text_encoder, model)
        logger.info("merged %s into the model, multiplied by %g", file.name, multiplier)


def attach_network(
    settings: NetworkSettings, network: Network, model: nn.Module, text_encoder: nn.Module, device: torch.device
) -> None:
    """Attaches the network, moves it, in float32, and loads network_weights."""
    network.apply_to(text_encoder, model, not settings.network_train_unet_only, True)
    network.to(device, torch.float32)
    if settings.network_weights is not None and not settings.dim_from_weights:
        network.load_weights(settings.network_weights, settings.allow_partial_weights)


@torch.no_grad()
def prove_loadable(network: Network, formats: Collection[str], model: nn.Module, text_encoder: nn.Module) -> None:
    """Exports the network in memory as it will be saved, reads it as ComfyUI would, and as it is loaded here.

    Raises ModelFileError naming what would be lost, before any time is spent on training; SettingError for a format
    that cannot hold this network.
    """
    shapes = weight_shapes(model, text_encoder)
    own = network.adapter_tensors()
    for file_format in formats:
        tensors = network.export(file_format)
        problems = check_comfyui_reads(tensors, shapes)
        if not problems:
            problems = _differences(own, fit_adapter_tensors(tensors, shapes), exact=file_format != "diffusers")
        if problems:
            raise ModelFileError(f"the adapter would not load as it is in {file_format} form: {first_ten(problems)}")


def _differences(own: Adapters, again: Adapters, exact: bool) -> list[str]:
    """Modules that differ after a round trip; diffusers' form bakes alpha in, so there only shapes are compared."""
    problems = [f"{path} is lost" for path in own if path not in again]
    for path in own.keys() & again.keys():
        theirs = again[path]
        same = all(
            suffix in theirs
            and (torch.equal(tensor.cpu(), theirs[suffix]) if exact else tensor.shape == theirs[suffix].shape)
            for suffix, tensor in own[path].items()
        )
        if not same:
            problems.append(f"{path} comes back changed")
    return problems


def facts_from_weights(settings: NetworkSettings, network: Network) -> dict[str, Any]:
    """What metadata says of a network whose types and ranks came from a file: those of most of its modules.

    Empty where the settings tell: without dim_from_weights.
    """
    if not settings.dim_from_weights:
        return {}
    adapters = network.adapter_tensors()
    described = Counter(
        (found.kind, WHOLE_MATRIX_RANK if found.full_matrix else found.rank, float(adapters[path]["alpha"]))
        for path, found in infer_types(adapters).items()
        if "alpha" in adapters[path]
    )
    kind, rank, alpha = described.most_common(1)[0][0]
    return {"ss_network_module": f"networks.{kind}_anima", "ss_network_dim": rank, "ss_network_alpha": alpha}


def summary_table(network: Network, groups: Collection[Mapping[str, Any]]) -> str:
    """What trains, one line for each parameter group: modules, their adapters, parameters, rate."""
    types, paths = infer_types(network.adapter_tensors()), network.paths()
    lines = [f"{'group':<16}{'modules':>8}  {'parameters':>12}  {'rate':>8}  adapters"]
    for group in groups:
        own = {paths[id(parameter)] for parameter in group["params"]}
        kinds = Counter(_described(types[path]) for path in own)
        lines.append(
            f"{group['name']:<16}{len(own):>8}  {sum(p.numel() for p in group['params']):>12,}  "
            f"{group['lr']:>8.2g}  {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}"
        )
    return "\n".join(lines)


def described_adapters(network: Network) -> str:
    """What trains: "280 lora rank 16, 113 norm"."""
    types, paths = infer_types(network.adapter_tensors()), network.paths()
    trained = {paths[id(parameter)] for parameter in network.parameters() if parameter.requires_grad}
    kinds = Counter(_described(types[path]) for path in trained)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def _described(adapter: AdapterType) -> str:
    whole = " whole" if adapter.full_matrix else f" rank {adapter.rank}" if adapter.rank else ""
    return f"{adapter.kind}{whole}{' DoRA' if adapter.dora else ''}"
