"""Optimizers: made from settings, and what is special about some of them.

A schedule-free optimizer trains at one point and averages its way to another, which is the one to use
(https://arxiv.org/abs/2405.15682); `averaged_weights` goes there and back. Prodigy and D-Adaptation find the learning
rate themselves: their groups hold it as "d", which learning_rate multiplies (https://arxiv.org/abs/2306.06101).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from library.errors import SettingError
from library.garbage import uncollected
from library.options import option, split_arguments
from library.training.optimization.flat_adamw import FlatAdamW
from library.training.optimization.optimizer_names import OPTIMIZER_NAMES, find_optimizer, is_adafactor


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer moves the adapter, and how fast."""

    optimizer_type: str = option(
        "AdamW",
        f"Optimizer by name, in any case: {', '.join(OPTIMIZER_NAMES)}; any class of torch.optim; or "
        "package.module.Class. AdamW8bit saves memory, Prodigy finds the rate itself (learning_rate = 1).",
    )
    optimizer_args: tuple[str, ...] = option(
        (), "Arguments of the optimizer, each 'key=value', such as 'weight_decay=0.01' or 'betas=0.9,0.99'."
    )
    learning_rate: float = option(
        1e-4, "Learning rate. 1e-4 suits AdamW, a third of it Lion; give 1 for Prodigy, ProdigyPlus… and DAdapt…."
    )
    max_grad_norm: float = option(
        1.0,
        "Gradients are scaled down to this norm, so that one odd picture does not throw the adapter off; 0 leaves them "
        "alone.",
    )


def optimizer_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """optimizer_args as typed keyword arguments, checked against the class.

    Raises SettingError naming an entry that is not 'key=value', or a key the optimizer does not take.
    """
    cls, implied = find_optimizer(settings.optimizer_type)
    arguments = typed_arguments("optimizer_args", settings.optimizer_args)
    known = named_parameters(cls)
    for name in arguments:
        if name not in known or name in ("params", "lr"):
            raise SettingError(
                f"optimizer_args: {settings.optimizer_type} takes no {name!r}; it takes "
                + ", ".join(key for key in known if key not in ("params", "lr"))
                + (" (the rate is learning_rate)" if name == "lr" else "")
            )
    return {**implied, **arguments}


def typed_arguments(setting: str, entries: Sequence[str]) -> dict[str, Any]:
    """('betas=0.9,0.99', 'amsgrad=true') -> {'betas': (0.9, 0.99), 'amsgrad': True}; other texts stay texts."""
    return {name: _typed(text) for name, text in split_arguments(setting, entries).items()}


def named_parameters(callable_: Any) -> list[str]:
    """The names that a class or function takes as keywords; what it would swallow as **kwargs is not among them."""
    parameters = inspect.signature(callable_).parameters.values()
    return [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]


def _typed(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@uncollected()  # torch's first one imports torch._dynamo: many objects and no garbage, a quarter of that second
def make_optimizer(
    settings: OptimizerSettings, parameter_groups: Sequence[Mapping[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer over an adapter network's parameter groups; AdamW runs fused on CUDA unless told otherwise.

    Raises SettingError where the optimizer cannot use the value of an argument.
    """
    cls, arguments = find_optimizer(settings.optimizer_type)[0], optimizer_arguments(settings)
    if cls is torch.optim.AdamW and device.type == "cuda" and not {"fused", "foreach"} & arguments.keys():
        arguments["fused"] = True
    if cls is torch.optim.AdamW and arguments.get("fused"):
        cls = FlatAdamW
    groups = [dict(group) for group in parameter_groups]
    rates = [group.get("lr", settings.learning_rate) for group in groups]
    relative_step = is_adafactor(cls) and arguments.get("relative_step", True)
    if relative_step:  # Adafactor refuses rates that it would not use
        for group in groups:
            group.pop("lr", None)
    try:
        optimizer = cls(groups, lr=None if relative_step else settings.learning_rate, **arguments)
    except Exception as error:  # each package has exceptions of its own for values that it cannot use
        raise SettingError(_cannot_use(settings, error)) from error
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if is_schedule_free(optimizer):
        optimizer.train()
    _keep_dtypes_of_loaded_state(optimizer)
    return optimizer


def _keep_dtypes_of_loaded_state(optimizer: torch.optim.Optimizer) -> None:
    """Loads each state tensor in the dtype it was saved in, where torch would cast it to the parameter's.

    ProdigyPlusScheduleFree sums in bfloat16: in float32 a resumed run would round otherwise than one without a break.
    """
    saved: dict[int, dict[str, torch.dtype]] = {}

    def remember(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        for number, state in state_dict["state"].items():
            saved[number] = {name: value.dtype for name, value in state.items() if isinstance(value, torch.Tensor)}

    def restore(loaded: torch.optim.Optimizer) -> None:
        parameters = [parameter for group in loaded.param_groups for parameter in group["params"]]
        for number, dtypes in saved.items():
            state = loaded.state[parameters[number]]
            state.update({name: state[name].to(dtype) for name, dtype in dtypes.items()})
        saved.clear()

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(restore)


def check_optimizer(settings: OptimizerSettings, rates: Mapping[str, float] | None = None) -> torch.optim.Optimizer:
    """Makes an optimizer for a few numbers and lets it step, so that what it cannot do is known before a run.

    rates: learning rates by name of their parameter group, where they are known. Returns the optimizer.
    Raises SettingError for what the optimizer cannot use.
    """
    groups = [
        {"name": name, "lr": rate, "params": [nn.Parameter(torch.ones(2, 2))]}
        for name, rate in (rates or {"all": settings.learning_rate}).items()
    ]
    optimizer = make_optimizer(settings, groups, torch.device("cpu"))
    # bitsandbytes is for GPUs; not every version steps on a CPU.
    if not type(optimizer).__module__.startswith("bitsandbytes"):
        for group in groups:
            group["params"][0].grad = torch.ones(2, 2)
        try:
            optimizer.step()
        except Exception as error:
            raise SettingError(_cannot_use(settings, error, rates)) from error
    return optimizer


def _cannot_use(settings: OptimizerSettings, error: Exception, rates: Mapping[str, float] | None = None) -> str:
    given = [", ".join(settings.optimizer_args)] if settings.optimizer_args else []
    if rates and len(set(rates.values())) > 1:
        given.append("different rates (" + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()) + ")")
    name = "optimizer_args" if settings.optimizer_args else "optimizer_type"
    what = f"cannot use {' with '.join(given)}" if given else "cannot be used"
    return f"{name}: {settings.optimizer_type} {what}: {error}"


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights to use differ from those being trained."""
    switches = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    return switches and optimizer.param_groups[0].get("use_schedulefree", True)


def finds_own_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Whether learning_rate only multiplies a rate that the optimizer finds."""
    return "d" in optimizer.param_groups[0]


def sets_own_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Whether learning_rate and its schedule are not used at all: Adafactor with relative_step, its default."""
    return is_adafactor(type(optimizer)) and optimizer.param_groups[0]["relative_step"]


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the parameters of a schedule-free optimizer are the averaged ones, for use rather than for training.

    Afterwards they are what they were bit for bit, where the optimizer's own way back would round: looking at a run
    does not change it. Other optimizers have one set of weights, and nothing happens.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, values in zip(parameters, trained, strict=True):
                parameter.copy_(values)


def rates_before_step(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float | torch.Tensor]:
    """What the step to come goes by, as `rates_of_step` takes it; nothing waits for the device.

    By curve: lr/<group>, and lr/d*lr/<group> where the optimizer finds d. factor: multiplies the scheduled rates.
    """
    rates = {}
    for group in optimizer.param_groups:
        rate = rates[f"lr/{group['name']}"] = group["lr"] * factor
        if finds_own_rate(optimizer):
            rates[f"lr/d*lr/{group['name']}"] = group["d"] * rate
    return rates


def rates_of_step(optimizer: torch.optim.Optimizer, before: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """The rates by curve of the step that was just taken. Waits for the device.

    before: from `rates_before_step`, as optimizers find the next d, and schedules the next rate, at the end of a step.
    """
    if sets_own_rate(optimizer):  # from the weights and the number of the step, which its state holds from then on
        return {f"lr/{group['name']}": float(_own_rate(optimizer, group)) for group in optimizer.param_groups}
    return {curve: float(rate) for curve, rate in before.items()}


def _own_rate(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float | torch.Tensor:
    """Adafactor's rate, which differs by tensor, for the group's first that has been trained."""
    states = (optimizer.state[parameter] for parameter in group["params"])
    return next((optimizer._get_lr(group, state) for state in states if state), 0.0)
