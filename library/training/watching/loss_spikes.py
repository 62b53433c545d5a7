"""Steps whose loss is far above what is usual at their timesteps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from library.training.step_records import SampleLoss, StepRecord

# A flow's loss depends on t more than on anything else: it is compared within a tenth of [0, 1].
_PARTS = 10
# A part is judged when it has seen this many samples, and follows the last 200 or so from then on.
_LEAST_SAMPLES = 20
_MEMORY = 200
# A spike is also this many standard deviations out: where losses always scatter widely, 3 times the mean is none.
_DEVIATIONS = 4.0


@dataclass
class _Part:
    """Losses at timesteps near each other: their number, running mean and variance."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, loss: float) -> None:
        """Exact mean and variance at first, then exponentially weighted ones (Finch, 2009, section 9)."""
        weight = max(1 / (self.count + 1), 1 / _MEMORY)
        difference = loss - self.mean
        self.count += 1
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)


@dataclass(frozen=True)
class LossSpike:
    """A step far above what is usual. expected: the mean loss that is usual for it. worst: its samples, worst first."""

    step: int
    loss: float
    expected: float
    worst: tuple[SampleLoss, ...]


class LossSpikes:
    """Knows the losses that are usual at each timestep, and finds steps that are not.

    ratio: a step's mean loss is a spike from this many times the usual one on.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._parts = [_Part() for _ in range(_PARTS)]

    def spike(self, record: StepRecord) -> LossSpike | None:
        """The spike that the step is, if it is one; then its samples are among those that later ones compare with.

        A sample counts there as `ratio` times the usual loss at most: one spike does not hide the next.
        """
        if not (record.is_finite and record.samples):
            return None
        found = self._judge(record)
        for sample in record.samples:
            part = self._part(sample)
            is_known = part.count >= _LEAST_SAMPLES
            part.add(min(sample.loss, self._ratio * part.mean) if is_known else sample.loss)
        return found

    def _judge(self, record: StepRecord) -> LossSpike | None:
        parts = [self._part(sample) for sample in record.samples]
        if min(part.count for part in parts) < _LEAST_SAMPLES:
            return None
        loss = sum(sample.loss for sample in record.samples)
        expected = sum(part.mean for part in parts)
        deviation = math.sqrt(sum(part.variance for part in parts))
        if loss <= self._ratio * expected or loss - expected <= _DEVIATIONS * deviation:
            return None
        worst = sorted(record.samples, key=lambda sample: self._part(sample).mean - sample.loss)
        count = len(parts)
        return LossSpike(record.step, loss / count, expected / count, tuple(worst))

    def _part(self, sample: SampleLoss) -> _Part:
        return self._parts[min(int(sample.timestep * _PARTS), _PARTS - 1)]

    def state_dict(self) -> dict[str, Any]:
        """What is usual, for a state to resume from."""
        return {"parts": [(part.count, part.mean, part.variance) for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self._parts = [_Part(*values) for values in state_dict["parts"]]
