"""Building a network: new, or as a file describes it. The thin Kohya entry points call these."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.errors import ModelFileError, SettingError, did_you_mean
from networks.adapter import Adapter, Dropouts
from networks.adapter_files import fit_adapter_tensors, load_adapter_file
from networks.adapter_types import Adapters, adapter_kind
from networks.arguments import NetworkArguments, by_pattern, read_arguments
from networks.deltas import ADAPTER_CLASSES
from networks.key_formats import resolve_norm_values
from networks.lokr import LoKr
from networks.network import AdapterNetwork
from networks.norm import NormDelta
from networks.patterns import unmatched, value_for
from networks.targets import find_linears, find_norms, named_modules, trainable_modules

# From here on a rank stands for "whole matrix" (LyCORIS' users write 100000).
WHOLE_MATRIX_RANK = 100000


def entry_point(adapter_type: str) -> Callable[..., AdapterNetwork]:
    """A network module's `create_network`, with the arguments that trainers of Kohya's kind give it."""

    def create_network(
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoder: nn.Module | None,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **network_args: Any,
    ) -> AdapterNetwork:
        """A new network for the transformer `unet`, to be attached with `apply_to`.

        network_dim: rank, default 4; network_alpha: default 1, and 0 means the rank, as in Kohya's scripts.
        network_args: see `NetworkArguments`. Raises SettingError for arguments, ranks or patterns of no use.
        """
        arguments = read_arguments(network_args, adapter_type)
        modules = trainable_modules(named_modules(unet, text_encoder), arguments)
        dropouts = Dropouts(
            neuron_dropout or 0.0, arguments.rank_dropout, arguments.module_dropout, arguments.rank_dropout_scale
        )
        rank = 4 if network_dim is None else int(network_dim)
        alpha = 1.0 if network_alpha is None else float(network_alpha)
        adapters = _new_adapters(adapter_type, arguments, dropouts, rank, alpha, modules)
        return AdapterNetwork(adapters, multiplier, arguments)

    return create_network


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: nn.Module | None,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    allow_partial: bool = False,
    **network_args: Any,
) -> tuple[AdapterNetwork, Adapters]:
    """The network that a file (or its tensors, `weights_sd`) describes, with its weights.

    Types, ranks, factors, DoRA, norms and targets are the file's own, module by module. Of network_args only what does
    not change these is used: rates. Raises ModelFileError as `load_adapter_file` does.
    """
    modules = named_modules(unet, text_encoder)
    shapes = weight_shapes(unet, text_encoder)
    if weights_sd is None:
        given, _ = load_adapter_file(Path(file), shapes, allow_partial)
    else:
        given = fit_adapter_tensors(weights_sd, shapes, allow_partial)
    given = resolve_norm_values(given, lambda path: modules[path].weight)
    adapters = {path: _adapter_of(path, tensors, modules[path]) for path, tensors in given.items()}
    return AdapterNetwork(adapters, multiplier, read_arguments(network_args, None)), given


def weight_shapes(unet: nn.Module, text_encoder: nn.Module | None) -> dict[str, tuple[int, ...]]:
    """The weight's shape of every module that has one, by the paths that adapters go by."""
    return {
        path: tuple(module.weight.shape)
        for path, module in named_modules(unet, text_encoder).items()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def _new_adapters(
    adapter_type: str,
    arguments: NetworkArguments,
    dropouts: Dropouts,
    rank: int,
    alpha: float,
    modules: Mapping[str, nn.Module],
) -> dict[str, Adapter]:
    linears = find_linears(modules, arguments)
    norms = find_norms(modules, arguments) if arguments.train_norm else {}
    ranks = by_pattern("network_reg_dims", arguments.network_reg_dims, int)
    alphas = by_pattern("network_reg_alphas", arguments.network_reg_alphas, float)
    _check_ranks([rank, *ranks.values()], adapter_type)
    for name, entries, paths in (
        ("network_reg_dims", ranks, linears),
        ("network_reg_alphas", alphas, linears),
        ("network_reg_lrs", by_pattern("network_reg_lrs", arguments.network_reg_lrs, float), {**linears, **norms}),
    ):
        for pattern in unmatched(entries, paths):
            raise SettingError(f"network_args: {name}: {pattern!r} matches no adapter{did_you_mean(pattern, paths)}")
    adapters: dict[str, Adapter] = {
        path: _new_adapter(
            adapter_type, arguments, dropouts, linear, value_for(path, ranks, rank), value_for(path, alphas, alpha)
        )
        for path, linear in linears.items()
    }
    return adapters | {path: NormDelta(norm.weight.shape[0]) for path, norm in norms.items()}


def _new_adapter(
    adapter_type: str, arguments: NetworkArguments, dropouts: Dropouts, linear: nn.Linear, rank: int, alpha: float
) -> Adapter:
    alpha = alpha or float(rank)
    if arguments.rs_lora:  # the scale alpha / √rank, written so that readers' alpha / rank agrees
        alpha *= math.sqrt(rank)
    sizes = linear.in_features, linear.out_features
    if adapter_type == "lokr":
        adapter: Adapter = LoKr.for_linear(
            *sizes, rank, alpha, dropouts,
            factor=arguments.factor, full_matrix=arguments.full_matrix, decompose_both=arguments.decompose_both,
        )  # fmt: skip
    else:
        adapter = ADAPTER_CLASSES[adapter_type](*sizes, rank, alpha, dropouts)
    if arguments.dora:
        adapter.enable_dora(linear)
    return adapter


def _check_ranks(ranks: Sequence[int], adapter_type: str) -> None:
    for rank in ranks:
        if rank < 1 or (rank >= WHOLE_MATRIX_RANK and adapter_type != "lokr"):
            raise SettingError(f"network_dim: {rank} is not a rank; give 1 or more, far below the model's widths")


def _adapter_of(path: str, tensors: dict[str, Tensor], module: nn.Module) -> Adapter:
    kind = adapter_kind(path, tensors)
    if kind not in ADAPTER_CLASSES or "b_norm" in tensors:
        raise ModelFileError(
            f"the adapter file changes {path} by {', '.join(tensors)}; "
            "only LoRA, LoKr, LoHa and norm differences can be trained or merged here"
        )
    adapter = ADAPTER_CLASSES[kind].from_tensors(tensors)
    if "dora_scale" in tensors:
        adapter.enable_dora(module)
    adapter.load_tensors(tensors)
    return adapter
