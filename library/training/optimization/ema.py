"""An average of the adapter over its last steps, which is often smoother than the adapter itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import SettingError
from library.options import option
from library.training.optimization.optimizers import is_schedule_free


@dataclass(frozen=True)
class EmaSettings:
    """An exponential moving average (EMA) of the adapter, saved beside it as <name>-ema.safetensors."""

    ema_decay: float | None = option(
        None,
        "Keep an average of the adapter: this is how much of it stays at each step. 0.99 averages over about 100 "
        "steps, 0.999 over 1000; take a tenth of the run at most. Unset: none is kept.",
        zero_is_unset=True,
    )
    ema_power: float | None = option(
        None,
        "How the decay rises to ema_decay in the beginning: after n steps it is 1 - (1 + n)^-power; 2/3 to 3/4 are "
        "usual. Unset: (1 + n) / (10 + n).",
        zero_is_unset=True,
    )
    ema_device: str = option(
        "same", "Where the average is kept: cpu saves as much GPU memory as the adapter takes, for slower steps.",
        choices=("same", "cpu"),
    )  # fmt: skip


def check_ema(settings: EmaSettings, optimizer: torch.optim.Optimizer) -> None:
    """SettingError where the optimizer already averages."""
    if settings.ema_decay is not None and is_schedule_free(optimizer):
        name = type(optimizer).__name__
        raise SettingError(f"ema_decay: {name} averages the weights itself; leave ema_decay unset, or take AdamW")


class AdapterEma:
    """The average of a network's trained weights, in float32."""

    def __init__(self, settings: EmaSettings, network: nn.Module) -> None:
        self._settings = settings
        self._network = network
        self._updates = 0
        self._average: dict[str, Tensor] = {}

    def _weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._network.named_parameters() if weight.requires_grad}

    def update(self, moved: Tensor) -> None:
        """Takes in the weights as they are after a step. moved: a bool scalar; where False, nothing changes."""
        weights = {name: weight.float() for name, weight in self._weights().items()}
        if self._settings.ema_device == "cpu":
            weights = {name: weight.to("cpu") for name, weight in weights.items()}
            moved = moved.to("cpu")
        if not self._average:
            self._average = {name: weight.clone() for name, weight in weights.items()}
        self._updates += 1
        average = [self._average[name] for name in weights]
        share = 1 - decay_after(self._updates, self._settings)
        differences = torch._foreach_sub(list(weights.values()), average)
        torch._foreach_mul_(differences, share * moved)
        torch._foreach_add_(average, differences)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network's weights are the average; afterwards they are what they were, bit for bit."""
        weights = self._weights()
        trained = {name: weight.clone() for name, weight in weights.items()}
        for name, average in self._average.items():
            weights[name].copy_(average)
        try:
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(trained[name])

    def state_dict(self) -> dict[str, Any]:
        """The average, for a state to resume from."""
        return {"updates": self._updates, "average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        weights, on_cpu = self._weights(), self._settings.ema_device == "cpu"
        self._updates = state_dict["updates"]
        self._average = {
            name: average.to("cpu" if on_cpu else weights[name].device, copy=True)
            for name, average in state_dict["average"].items()
        }


def decay_after(updates: int, settings: EmaSettings) -> float:
    """How much of the average stays at its n-th update; it rises to ema_decay as in diffusers' EMAModel, where
    ema_power is its use_ema_warmup with an inverse gamma of 1."""
    if settings.ema_power is None:
        rising = (1 + updates) / (10 + updates)
    else:
        rising = 1 - (1 + updates) ** -settings.ema_power
    return min(settings.ema_decay, rising)
