"""Which modules of the model get an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from library.errors import SettingError, did_you_mean
from networks.arguments import NetworkArguments
from networks.module_names import LLM_ADAPTER, TEXT_ENCODER
from networks.patterns import matches, unmatched

TRANSFORMER_TARGETS = (
    r"blocks\.\d+\.(self_attn|cross_attn)\.(q_proj|k_proj|v_proj|output_proj)",
    r"blocks\.\d+\.mlp\.layer[12]",
)
LLM_ADAPTER_TARGETS = (
    r"llm_adapter\.blocks\.\d+\.(self_attn|cross_attn)\.(q_proj|k_proj|v_proj|o_proj)",
    r"llm_adapter\.blocks\.\d+\.mlp\.[02]",
)
TEXT_ENCODER_TARGETS = (
    r"text_encoder\.layers\.\d+\.self_attn\.[qkvo]_proj",
    r"text_encoder\.layers\.\d+\.mlp\.(gate|up|down)_proj",
)
DEFAULT_TARGETS = (*TRANSFORMER_TARGETS, *LLM_ADAPTER_TARGETS, *TEXT_ENCODER_TARGETS)


def named_modules(model: nn.Module, text_encoder: nn.Module | None) -> dict[str, nn.Module]:
    """All modules by the paths that adapters go by: the transformer's own, Qwen3's after "text_encoder."."""
    modules = dict(model.named_modules())
    if text_encoder is not None:
        modules |= {TEXT_ENCODER + path: module for path, module in text_encoder.named_modules()}
    return modules


def trainable_modules(modules: Mapping[str, nn.Module], arguments: NetworkArguments) -> dict[str, nn.Module]:
    """The modules in the parts that the arguments train at all."""
    left_out = []
    if not arguments.train_llm_adapter or arguments.llm_adapter_lr == 0:
        left_out.append(LLM_ADAPTER)
    if not arguments.train_text_encoder:
        left_out.append(TEXT_ENCODER)
    return {path: module for path, module in modules.items() if not path.startswith(tuple(left_out))}


def find_linears(modules: Mapping[str, nn.Module], arguments: NetworkArguments) -> dict[str, nn.Linear]:
    """The Linears to adapt, in the model's order: the default ones or target_modules, less exclude_patterns, and
    include_patterns on top.

    Raises SettingError when a pattern matches nothing, with near names, or when nothing is left.
    """
    linears = {path: module for path, module in modules.items() if isinstance(module, nn.Linear)}
    for name in ("target_modules", "exclude_patterns", "include_patterns"):
        _check_patterns(name, getattr(arguments, name), modules if name == "exclude_patterns" else linears)

    def is_target(path: str) -> bool:
        if any(matches(path, pattern) for pattern in arguments.include_patterns):
            return True
        if any(matches(path, pattern) for pattern in arguments.exclude_patterns):
            return False
        if arguments.target_modules:
            return any(matches(path, pattern) for pattern in arguments.target_modules)
        return any(re.fullmatch(expression, path) for expression in DEFAULT_TARGETS)

    targets = {path: linear for path, linear in linears.items() if is_target(path)}
    if not targets:
        raise SettingError("network_args: exclude_patterns leaves no Linear to adapt")
    return targets


def find_norms(modules: Mapping[str, nn.Module], arguments: NetworkArguments) -> dict[str, nn.Module]:
    """The norms of the transformer and the LLM adapter, as far as exclude_patterns does not name them."""
    return {
        path: module
        for path, module in modules.items()
        if type(module).__name__ == "RMSNorm"
        and not path.startswith(TEXT_ENCODER)
        and not any(matches(path, pattern) for pattern in arguments.exclude_patterns)
    }


def _check_patterns(name: str, patterns: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    for pattern in unmatched(patterns, modules):
        names = {".".join(path.split(".")[-length:]) for path in modules for length in (1, 2, 9)}
        raise SettingError(
            f"network_args: {name}: {pattern!r} matches nothing in the model{did_you_mean(pattern, sorted(names))}"
        )
