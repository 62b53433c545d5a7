"""What an optimizer knows of a run, and whether another optimizer can take it over."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from library.errors import SettingError
from library.training.optimization.flat_adamw import FlatAdamW

logger = logging.getLogger(__name__)

# What says how an optimizer computes rather than what; learning rates may change when a run is resumed.
_FREE = ("lr", "fused", "foreach", "capturable")


def optimizer_content(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Any]:
    """For optimizer.pt: its class and arguments, the names of what it trains in its own order, and its state."""
    # Its state is that of torch's, so that either can go on from the other's.
    kind = torch.optim.AdamW if isinstance(optimizer, FlatAdamW) else type(optimizer)
    return {
        "type": f"{kind.__module__}.{kind.__qualname__}",
        "arguments": {name: repr(value) for name, value in optimizer.defaults.items() if name not in _FREE},
        "parameters": _names(optimizer, network),
        "state_dict": optimizer.state_dict(),
    }


def load_optimizer(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, network: nn.Module, ignore_mismatch: bool
) -> bool:
    """Takes over what `optimizer_content` gave, but for the rates, which stay the optimizer's own.

    Parameters are found by name, so that they may be grouped otherwise than before. Where the optimizer is of another
    class, has other arguments or cannot use the state, it starts anew with a warning: False is returned. SettingError
    without ignore_mismatch.
    """
    fresh = copy.deepcopy(optimizer.state_dict())
    own = optimizer_content(optimizer, network)
    problem = _difference(saved, own)
    if problem is None:
        try:
            optimizer.load_state_dict(_regrouped(saved, own))
            _keep_rates(optimizer, fresh["param_groups"])
            return True
        except Exception as error:  # each package has exceptions of its own for states that it cannot use
            problem = f"its state cannot be used: {error}"
            optimizer.load_state_dict(fresh)
    if not ignore_mismatch:
        raise SettingError(
            f"resume: the optimizer is another than the state's: {problem}. Use the state's, or set "
            "resume_ignore_optimizer_mismatch = true to keep the weights and start the optimizer anew"
        )
    logger.warning("resume: the weights are kept, and the optimizer starts anew: %s", problem)
    return False


def _difference(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """What differs between two contents, for a message; arguments that only one version of a package has do not."""
    if saved["type"] != own["type"]:
        return f"it was {saved['type']}, and is {own['type']}"
    then, now = saved["arguments"], own["arguments"]
    changed = [name for name in sorted(then.keys() & now.keys()) if then[name] != now[name]]
    return ", ".join(f"{name} was {then[name]}, and is {now[name]}" for name in changed) or None


def _regrouped(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state in the order and groups of the own one.

    What belongs to a whole group, such as a rate that the optimizer finds, is that of the group in which the first of
    its parameters was. Parameters that were not trained before have no state yet.
    """
    states, groups = saved["state_dict"]["state"], saved["state_dict"]["param_groups"]
    place = {name: index for index, name in enumerate(saved["parameters"])}
    group_of = {index: group for group in groups for index in group["params"]}
    names = own["parameters"]
    state = {index: states[place[name]] for index, name in enumerate(names) if place.get(name) in states}
    regrouped = []
    for group in own["state_dict"]["param_groups"]:
        known = [place[names[index]] for index in group["params"] if names[index] in place]
        values = group_of[known[0]] if known else group
        kept = {key: group[key] for key in ("name", "params") if key in group}
        regrouped.append({**values, **kept})
    return {**saved["state_dict"], "state": state, "param_groups": regrouped}


def _keep_rates(optimizer: torch.optim.Optimizer, fresh_groups: list[dict[str, Any]]) -> None:
    for group, fresh in zip(optimizer.param_groups, fresh_groups, strict=True):
        group.update({name: fresh[name] for name in ("lr", "initial_lr") if name in fresh})


def _names(optimizer: torch.optim.Optimizer, network: nn.Module) -> list[str]:
    name_of = {id(parameter): name for name, parameter in network.named_parameters()}
    return [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
