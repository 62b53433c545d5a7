"""Losses and speed of a run, between its log points."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass
class LossAverages:
    """What is known of the losses so far. epoch_sum, epoch_steps: of the epoch that is running."""

    average: float = 0.0
    losses_read: int = 0
    epoch_sum: float = 0.0
    epoch_steps: int = 0

    def take_in(self, losses: Iterable[float]) -> None:
        """Of the losses of further steps; those that are not finite, whose steps are left out, go into no average."""
        for loss in losses:
            if math.isfinite(loss):
                self.losses_read += 1
                self.average += (loss - self.average) / min(self.losses_read, 50)
                self.epoch_sum += loss
                self.epoch_steps += 1


class Meter:
    """Draws losses and speed at log points. averages: as of the last one."""

    def __init__(self, step: int, device: torch.device) -> None:
        self.averages = LossAverages()
        self._device = device
        self._current = 0.0
        self._step_seconds: list[float] = []
        self._last_step, self._last_time = step, time.perf_counter()

    def read(self, step: int, losses: Sequence[float]) -> dict[str, float]:
        """The curves' values at a log point after `step` steps. losses: those of the steps since the last log point.

        loss/average is the mean of the first 50 steps, and from then on their exponential moving average (decay 0.98).
        """
        self.averages.take_in(losses)
        self._current = losses[-1] if losses else self._current
        now = time.perf_counter()
        self._step_seconds.append((now - self._last_time) / (step - self._last_step))
        self._last_step, self._last_time = step, now
        return {"loss/current": self._current, "loss/average": self.averages.average}

    def close_epoch(self) -> float:
        """The mean loss of the epoch that ends here; its log point must have been read."""
        known = self.averages
        mean = known.epoch_sum / known.epoch_steps if known.epoch_steps else math.nan
        known.epoch_sum, known.epoch_steps = 0.0, 0
        return mean

    def summary(self) -> str:
        """One line for the end of a run."""
        if not self._step_seconds:
            return "no step was trained"
        text = f"{1000 * statistics.median(self._step_seconds):.0f} ms a step (median over log points)"
        if self._device.type == "cuda":
            text += f", peak memory {torch.cuda.max_memory_allocated(self._device) / 2**30:.2f} GiB"
        return text
