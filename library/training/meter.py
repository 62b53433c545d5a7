"""Losses and speed of a run, between its log points."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Meter:
    """Losses stay on the device until a log point reads them, so that no step waits for the GPU."""

    def __init__(self, step: int, device: torch.device) -> None:
        self._device = device
        self._pending: list[Tensor] = []
        self._epoch_sum = 0.0
        self._epoch_steps = 0
        self._current = 0.0
        self._average = 0.0
        self._losses_read = 0
        self._step_seconds: list[float] = []
        self._last_step, self._last_time = step, time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Takes in the mean loss of one step, without reading it."""
        self._pending.append(loss)

    def read(self, step: int, losses: Sequence[float]) -> dict[str, float]:
        """The curves' values at a log point after `step` steps.

        losses: those of the steps since the last log point, the first of what was added and not read yet.
        loss/average is the mean of the first 50 steps, and from then on their exponential moving average (decay 0.98).
        A loss that is not finite, whose step is left out, goes into no average.
        """
        del self._pending[: len(losses)]
        self._take_in(losses)
        now = time.perf_counter()
        self._step_seconds.append((now - self._last_time) / (step - self._last_step))
        self._last_step, self._last_time = step, now
        return {"loss/current": self._current, "loss/average": self._average}

    def close_epoch(self) -> float:
        """The mean loss of the epoch that ends here; its log point must have been read."""
        mean = self._epoch_sum / self._epoch_steps if self._epoch_steps else math.nan
        self._epoch_sum, self._epoch_steps = 0.0, 0
        return mean

    def read_rest(self) -> None:
        """Takes in what no log point has read yet, at the end of a run; waits for the device."""
        if self._pending:
            self._take_in(torch.stack(self._pending).tolist())
            self._pending.clear()

    def averages(self) -> dict[str, float]:
        """What a state keeps of the losses up to the last log point, for `restore`."""
        return {
            "average": self._average,
            "losses_read": self._losses_read,
            "epoch_sum": self._epoch_sum,
            "epoch_steps": self._epoch_steps,
        }

    def restore(self, averages: Mapping[str, float]) -> None:
        """Goes on from what `averages` gave; from nothing where that is empty."""
        self._average = averages.get("average", 0.0)
        self._losses_read = int(averages.get("losses_read", 0))
        self._epoch_sum = averages.get("epoch_sum", 0.0)
        self._epoch_steps = int(averages.get("epoch_steps", 0))

    def _take_in(self, losses: Sequence[float]) -> None:
        for loss in losses:
            self._current = loss
            if not math.isfinite(loss):
                continue
            self._losses_read += 1
            self._average += (loss - self._average) / min(self._losses_read, 50)
            self._epoch_sum += loss
            self._epoch_steps += 1

    def summary(self) -> str:
        """One line for the end of a run."""
        if not self._step_seconds:
            return "no step was trained"
        text = f"{1000 * statistics.median(self._step_seconds):.0f} ms a step (median over log points)"
        if self._device.type == "cuda":
            text += f", peak memory {torch.cuda.max_memory_allocated(self._device) / 2**30:.2f} GiB"
        return text
