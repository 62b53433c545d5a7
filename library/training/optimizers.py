"""Optimizers by name."""

from __future__ import annotations

import ast
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from library.errors import SettingError
from library.options import option, split_arguments


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer moves the adapter, and how fast."""

    optimizer_type: str = option("AdamW", "Optimizer by name, in any case: AdamW, AdamW8bit (needs bitsandbytes).")
    optimizer_args: tuple[str, ...] = option((), "Arguments of the optimizer, each 'key=value'.")
    learning_rate: float = option(1e-4, "Learning rate.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 leaves them alone.")


@dataclass(frozen=True)
class _Named:
    """Where an optimizer class lives, and the package that brings it."""

    module: str
    class_name: str
    package: str


_OPTIMIZERS = {
    "adamw": _Named("torch.optim", "AdamW", "torch"),
    "adamw8bit": _Named("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
}
_NAMES = ", ".join(named.class_name for named in _OPTIMIZERS.values())


def optimizer_class(settings: OptimizerSettings) -> type[torch.optim.Optimizer]:
    """The class a name stands for. Raises SettingError for an unknown name or a package that is not installed."""
    named = _OPTIMIZERS.get(settings.optimizer_type.lower())
    if named is None:
        raise SettingError(f"optimizer_type: {settings.optimizer_type!r} is not known; give one of {_NAMES}")
    try:
        return getattr(importlib.import_module(named.module), named.class_name)
    except ImportError as error:
        raise SettingError(
            f"optimizer_type: {settings.optimizer_type} needs the package {named.package}: pip install {named.package}"
        ) from error


def optimizer_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """optimizer_args as typed keyword arguments, checked against the class.

    Raises SettingError naming an entry that is not 'key=value', or a key the optimizer does not take.
    """
    arguments = {
        name: _typed(text) for name, text in split_arguments("optimizer_args", settings.optimizer_args).items()
    }
    known = inspect.signature(optimizer_class(settings)).parameters
    for name in arguments:
        if name not in known or name in ("params", "lr"):
            raise SettingError(
                f"optimizer_args: {settings.optimizer_type} takes no {name!r}; it takes "
                + ", ".join(key for key in known if key not in ("self", "params", "lr"))
                + (" (the rate is learning_rate)" if name == "lr" else "")
            )
    return arguments


def _typed(text: str) -> Any:
    """'(0.9, 0.99)' -> (0.9, 0.99), 'true' -> True; what is no Python literal stays text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_optimizer(
    settings: OptimizerSettings, parameter_groups: list[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over an adapter network's parameter groups; AdamW runs fused on CUDA unless told otherwise.

    Raises SettingError where the optimizer cannot use the value of an argument.
    """
    cls, arguments = optimizer_class(settings), optimizer_arguments(settings)
    if cls is torch.optim.AdamW and device.type == "cuda" and not {"fused", "foreach"} & arguments.keys():
        arguments["fused"] = True
    try:
        return cls(parameter_groups, lr=settings.learning_rate, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(settings.optimizer_args)
        raise SettingError(f"optimizer_args: {settings.optimizer_type} cannot use {given}: {error}") from error


def check_optimizer(settings: OptimizerSettings) -> None:
    """Raises what make_optimizer would, by making one for a single number."""
    make_optimizer(settings, [{"params": [torch.nn.Parameter(torch.zeros(1))]}], torch.device("cpu"))
