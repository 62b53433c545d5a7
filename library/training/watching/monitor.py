"""Watches memory and losses at log points, and raises the alarm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError, first_ten
from library.options import option
from library.training.step_records import StepRecord
from library.training.watching.loss_spikes import LossSpike, LossSpikes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MonitorSettings:
    """What is watched during a run, and whether it stops the run."""

    anima_monitor_memory: bool = option(True, "Watch GPU memory and draw its curves, gpu/*.")
    anima_monitor_alert_policy: str = option(
        "warn",
        "warn says what is wrong and goes on. raise saves a state and ends the run; also for a loss that is not a "
        "number, whatever on_nonfinite says.",
        choices=("warn", "raise"),
    )
    anima_monitor_memory_warn_ratio: float = option(
        0.95, "Share of the GPU's memory from which on there is an alert: the next larger batch may not fit."
    )
    anima_monitor_loss_spike_ratio: float | None = option(
        3.0,
        "A step whose loss is this many times the usual one at its timesteps, and far out of their scatter, is an "
        "alert. 0: none.",
        zero_is_unset=True,
    )


class AlertError(UserError):
    """An alert ended the run, as anima_monitor_alert_policy asks."""


@dataclass(frozen=True)
class Findings:
    """What a look at a run found: values of curves, and a message for each alert that is new."""

    values: Mapping[str, float]
    alerts: tuple[str, ...]


class Monitor:
    """Looks at what the steps since the last log point gave, and at the device."""

    def __init__(self, settings: MonitorSettings, network: nn.Module, device: torch.device) -> None:
        self._settings = settings
        self._parameters = list(network.parameters())
        self._device = device
        ratio = settings.anima_monitor_loss_spike_ratio
        self._spikes = LossSpikes(ratio) if ratio is not None else None
        self._was_near_limit = False

    def weights_norm(self) -> Tensor:
        """The Euclidean norm of all of the network's numbers together, on the device."""
        return nn.utils.get_total_norm([parameter.detach() for parameter in self._parameters])

    def look(self, records: Sequence[StepRecord], weights_norm: float) -> Findings:
        """Curves and alerts at a log point. That memory is nearly full is told once, until it no longer is."""
        memory = self._memory() if self._settings.anima_monitor_memory else {}
        spikes = [spike for record in records if self._spikes and (spike := self._spikes.spike(record))]
        alerts = [described(spike) for spike in spikes]
        used = memory.get("gpu/mem_usage_ratio", 0.0)
        is_near_limit = used >= self._settings.anima_monitor_memory_warn_ratio
        if is_near_limit and not self._was_near_limit:
            alerts.append(
                f"{used:.0%} of the GPU's memory is in use; a larger batch may not fit. gradient_checkpointing = true, "
                "a smaller batch_size or a smaller resolution need less"
            )
        self._was_near_limit = is_near_limit
        flags = {
            "alert/nonfinite_loss": any(not record.is_finite for record in records),
            "alert/loss_spike": bool(spikes),
            "alert/memory_near_limit": is_near_limit,
        }
        flags["alert/any"] = any(flags.values())
        norms = {"norm/weights": weights_norm}
        if records:
            norms["norm/gradient"] = records[-1].gradient_norm
        return Findings({**memory, **norms, **{name: float(flag) for name, flag in flags.items()}}, tuple(alerts))

    def report(self, findings: Findings, gather: Callable[[list[str]], list[str]] = list) -> None:
        """Tells the alerts. Raises AlertError under the policy "raise".

        gather: gives each process the lists of all, so that all of them end together and the main one can save: memory
        may be short on one GPU alone.
        """
        alerts = list(dict.fromkeys(gather(list(findings.alerts))))
        if alerts and self._settings.anima_monitor_alert_policy == "raise":
            raise AlertError("\n".join(alerts) + "\n(anima_monitor_alert_policy = raise)")
        for alert in alerts:
            logger.warning("%s", alert)

    def _memory(self) -> dict[str, float]:
        """The device's memory in MiB, and the share of it that cannot be had back: by this run's peak or by others."""
        if self._device.type != "cuda":
            return {}
        allocated, reserved, peak = (
            read(self._device)
            for read in (torch.cuda.memory_allocated, torch.cuda.memory_reserved, torch.cuda.max_memory_allocated)
        )
        free, total = torch.cuda.mem_get_info(self._device)
        return {
            "gpu/mem_allocated_mb": allocated / 2**20,
            "gpu/mem_reserved_mb": reserved / 2**20,
            "gpu/mem_peak_allocated_mb": peak / 2**20,
            "gpu/mem_usage_ratio": (total - free - reserved + peak) / total,
        }

    def state_dict(self) -> dict[str, Any]:
        """What is usual as of the last look, for a state to resume from."""
        return {} if self._spikes is None else self._spikes.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        if self._spikes is not None and state_dict:
            self._spikes.load_state_dict(state_dict)


def described(spike: LossSpike) -> str:
    """A spike and the pictures of its step, for people."""
    pictures = first_ten(f"{sample.path} (t {sample.timestep:.2f}, loss {sample.loss:.3g})" for sample in spike.worst)
    return (
        f"step {spike.step}: the loss is {spike.loss:.3g}, where {spike.expected:.3g} is usual at these timesteps; "
        f"pictures, worst first: {pictures}"
    )
