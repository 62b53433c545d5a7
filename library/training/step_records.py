"""What each step gave: its loss, its gradients' norm, and the loss of every sample.

All of it stays on the device until a log point reads it in one copy, so that no step waits for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleLoss:
    """One sample of a step. timestep: in [0, 1]. loss: as it counts, weighted and masked."""

    path: Path
    timestep: float
    loss: float


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. step: the steps done with it. gradient_norm: before clipping. samples: of all processes."""

    step: int
    loss: float
    gradient_norm: float
    samples: tuple[SampleLoss, ...]

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are numbers, neither infinite nor NaN."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class StepRecords:
    """Collects steps between two log points.

    gather: [x] -> [x of the first process, x of the second, …]; it is called by all processes at their log points.
    """

    def __init__(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        self._gather = gather
        self._paths: list[list[Sequence[Path]]] = [[]]  # of each step, the last of which is running: of each addition
        self._numbers: list[Tensor] = []  # of each addition [3 B], of each closed step [2]

    def add(self, paths: Sequence[Path], rows_B: Tensor, timesteps_B: Tensor, losses_B: Tensor) -> None:
        """Takes in samples of the running step. paths: of a batch. rows_B: the samples' places in it."""
        self._paths[-1].append(paths)
        self._numbers.append(torch.cat([rows_B.float(), timesteps_B.float(), losses_B.float()]))

    def close_step(self, loss: Tensor, gradient_norm: Tensor) -> None:
        """Ends the running step; both are scalars, and the same on all processes."""
        self._paths.append([])
        self._numbers.append(torch.stack([loss.float(), gradient_norm.float()]))

    def read(self, step: int) -> list[StepRecord]:
        """The steps closed since the last call, of which `step` is the last; waits for the device."""
        closed = self._paths[:-1]
        if not closed:
            return []
        numbers = iter(torch.split(torch.cat(self._numbers).cpu(), [len(each) for each in self._numbers]))
        samples, outcomes = [], []
        for additions in closed:
            samples.append([sample for paths in additions for sample in _samples(paths, next(numbers))])
            outcomes.append(next(numbers).tolist())
        self._paths, self._numbers = [[]], []
        first = step - len(closed) + 1
        of_all = zip(*self._gather([samples]), strict=True)
        return [
            StepRecord(first + index, *outcome, tuple(sample for own in of_processes for sample in own))
            for index, (outcome, of_processes) in enumerate(zip(outcomes, of_all, strict=True))
        ]


def _samples(paths: Sequence[Path], numbers: Tensor) -> list[SampleLoss]:
    rows, timesteps, losses = numbers.view(3, -1).tolist()
    return [SampleLoss(paths[int(row)], *values) for row, *values in zip(rows, timesteps, losses, strict=True)]
