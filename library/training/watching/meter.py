"""The losses of a run, between its log points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
    """Draws losses at log points. averages: as of the last one."""

    def __init__(self) -> None:
        self.averages = LossAverages()
        self._current = 0.0

    def read(self, losses: Sequence[float]) -> dict[str, float]:
        """The curves' values at a log point. losses: those of the steps since the last one.

        loss/average is the mean of the first 50 steps, and from then on their exponential moving average (decay 0.98).
        """
        self.averages.take_in(losses)
        self._current = losses[-1] if losses else self._current
        return {"loss/current": self._current, "loss/average": self.averages.average}

    def close_epoch(self) -> float:
        """The mean loss of the epoch that ends here; its log point must have been read."""
        known = self.averages
        mean = known.epoch_sum / known.epoch_steps if known.epoch_steps else math.nan
        known.epoch_sum, known.epoch_steps = 0.0, 0
        return mean
