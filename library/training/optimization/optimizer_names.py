"""From an optimizer's name to its class."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from library.errors import SettingError, did_you_mean


@dataclass(frozen=True)
class NamedOptimizer:
    """Where an optimizer class lives, the package that brings it, and arguments that its name implies."""

    module: str
    class_name: str
    package: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


_NESTEROV = {"momentum": 0.9, "nesterov": True}

_NAMED: dict[str, NamedOptimizer] = {
    "AdamW": NamedOptimizer("torch.optim", "AdamW", "torch"),
    "SGDNesterov": NamedOptimizer("torch.optim", "SGD", "torch", _NESTEROV),
    "AdaFactor": NamedOptimizer("transformers.optimization", "Adafactor", "transformers"),
    **{
        name: NamedOptimizer("bitsandbytes.optim", name, "bitsandbytes")
        for name in (
            *("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"),
            *("Lion8bit", "PagedLion8bit", "AdEMAMix8bit", "PagedAdEMAMix8bit"),
        )
    },
    "SGDNesterov8bit": NamedOptimizer("bitsandbytes.optim", "SGD8bit", "bitsandbytes", _NESTEROV),
    "Lion": NamedOptimizer("pytorch_optimizer", "Lion", "pytorch-optimizer"),
    "CAME": NamedOptimizer("pytorch_optimizer", "CAME", "pytorch-optimizer"),
    **{
        name: NamedOptimizer("schedulefree", name, "schedulefree")
        for name in ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
    },
    "Prodigy": NamedOptimizer("prodigyopt", "Prodigy", "prodigyopt"),
    "ProdigyPlusScheduleFree": NamedOptimizer("prodigyplus", "ProdigyPlusScheduleFree", "prodigy-plus-schedule-free"),
    # Kohya's scripts mean this one by the bare name.
    "DAdaptation": NamedOptimizer("dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation"),
    **{
        name: NamedOptimizer("dadaptation", name, "dadaptation")
        for name in ("DAdaptAdam", "DAdaptAdaGrad", "DAdaptAdan", "DAdaptLion", "DAdaptSGD")
    },
    **{
        name: NamedOptimizer("dadaptation.experimental", name, "dadaptation")
        for name in ("DAdaptAdamPreprint", "DAdaptAdanIP")
    },
}
OPTIMIZER_NAMES = tuple(_NAMED)


def find_optimizer(name: str) -> tuple[type[torch.optim.Optimizer], Mapping[str, Any]]:
    """The class that `optimizer_type` stands for, and the arguments its name implies.

    name: one of OPTIMIZER_NAMES or of torch.optim, in any case, with or without underscores; or package.module.Class.
    Raises SettingError for an unknown name, a package that is not installed, or a class that is no optimizer.
    """
    named = {_plain(known): value for known, value in _NAMED.items()}.get(_plain(name))
    if named is not None:
        return getattr(_module(name, named.module, named.package), named.class_name), named.arguments
    if "." not in name:
        return _of_torch(name), {}
    module_name, _, class_name = name.rpartition(".")
    cls = getattr(_module(name, module_name, _package_of(module_name)), class_name, None)
    if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)):
        raise SettingError(f"optimizer_type: {module_name} has no optimizer class {class_name}")
    return cls, {}


def is_adafactor(cls: type) -> bool:
    """Whether it is transformers' Adafactor; told by its name, as importing transformers takes seconds."""
    named = _NAMED["AdaFactor"]
    return any((base.__module__, base.__name__) == (named.module, named.class_name) for base in cls.__mro__)


def _of_torch(name: str) -> type[torch.optim.Optimizer]:
    classes = {
        each.lower(): value
        for each, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if _plain(name) not in classes:
        raise SettingError(
            f"optimizer_type: {name!r} is not known{did_you_mean(name, OPTIMIZER_NAMES)} (There are "
            f"{', '.join(OPTIMIZER_NAMES)}, the classes of torch.optim, and package.module.Class.)"
        )
    return classes[_plain(name)]


def _module(name: str, module_name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise SettingError(f"optimizer_type: {name} needs a package ({error}): pip install {package}") from error


def _package_of(module_name: str) -> str:
    """What pip calls the package of a module: some are named otherwise than what they install."""
    root = module_name.partition(".")[0]
    return {named.module.partition(".")[0]: named.package for named in _NAMED.values()}.get(root, root)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
