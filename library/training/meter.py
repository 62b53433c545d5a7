"""Losses and speed of a run, between its log points."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor


class Meter:
    """Losses stay on the device until a log point reads them, so that no step waits for the GPU."""

    def __init__(self, step: int, device: torch.device) -> None:
        self._device = device
        self._pending: list[Tensor] = []
        self._epoch: list[float] = []
        self._current = 0.0
        self._average = 0.0
        self._losses_read = 0
        self._step_seconds: list[float] = []
        self._last_step, self._last_time = step, time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Takes in the mean loss of one step, without reading it."""
        self._pending.append(loss)

    def read(self, step: int) -> dict[str, float]:
        """The curves' values at a log point after `step` steps; waits for the device.

        loss/average is the mean of the first 50 steps, and from then on their exponential moving average (decay 0.98).
        """
        losses = torch.stack(self._pending).tolist()
        self._pending.clear()
        self._epoch += losses
        self._current = losses[-1]
        for loss in losses:
            self._losses_read += 1
            self._average += (loss - self._average) / min(self._losses_read, 50)
        now = time.perf_counter()
        self._step_seconds.append((now - self._last_time) / (step - self._last_step))
        self._last_step, self._last_time = step, now
        values = {"loss/current": self._current, "loss/average": self._average}
        if self._device.type == "cuda":
            values["gpu/mem_peak_allocated_mb"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        return values

    def shown(self) -> dict[str, str]:
        """What stands behind the progress bar."""
        return {"loss": f"{self._current:.4f}", "average": f"{self._average:.4f}"}

    def close_epoch(self) -> float:
        """The mean loss of the epoch that ends here; its log point must have been read."""
        mean = statistics.fmean(self._epoch)
        self._epoch.clear()
        return mean

    def summary(self) -> str:
        """One line for the end of a run."""
        if not self._step_seconds:
            return "no step was trained"
        text = f"{1000 * statistics.median(self._step_seconds):.0f} ms a step (median over log points)"
        if self._device.type == "cuda":
            text += f", peak memory {torch.cuda.max_memory_allocated(self._device) / 2**30:.2f} GiB"
        return text
