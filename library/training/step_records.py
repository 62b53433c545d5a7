"""What each step gave: its loss, its gradients' norm, and the loss of every sample.

All of it stays on the device until a log point copies it to main memory in one go, where it is read when it has come:
no step waits for the GPU, nor need the GPU wait for whoever reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.training.host_copy import HostCopy


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


@dataclass(frozen=True)
class _Coming:
    """Numbers of closed steps on their way to main memory, and how to cut them up again."""

    step: int
    paths: list[list[Sequence[Path]]]
    sizes: list[int]
    host: HostCopy

    def read(self) -> tuple[float, list[list[Tensor]], list[list[float]]]:
        """The extra number, each step's additions, and each step's loss and gradient norm, when all have come."""
        extra, *numbers = torch.split(self.host.wait(), self.sizes)
        rest, additions, outcomes = iter(numbers), [], []
        for own in self.paths:
            additions.append([next(rest) for _ in own])
            outcomes.append(next(rest).tolist())
        return extra.item(), additions, outcomes


class StepRecords:
    """Collects steps between two log points.

    gather: [x] -> [x of the first process, x of the second, …]; it is called by all processes at their log points.
    """

    def __init__(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        self._gather = gather
        self._paths: list[list[Sequence[Path]]] = [[]]  # of each step, the last of which is running: of each addition
        self._numbers: list[Tensor] = []  # of each addition [3 B], of each closed step [2]
        self._coming: _Coming | None = None

    def add(self, paths: Sequence[Path], rows_B: Tensor, timesteps_B: Tensor, losses_B: Tensor) -> None:
        """Takes in samples of the running step. paths: of a batch. rows_B: the samples' places in it."""
        self._paths[-1].append(paths)
        self._numbers.append(torch.cat([rows_B.float(), timesteps_B.float(), losses_B.float()]))

    def close_step(self, loss: Tensor, gradient_norm: Tensor) -> None:
        """Ends the running step; both are scalars, and the same on all processes."""
        self._paths.append([])
        self._numbers.append(torch.stack([loss.float(), gradient_norm.float()]))

    def start(self, step: int, extra: Tensor) -> None:
        """Sends the steps closed since the last call, of which `step` is the last, on their way to `finish`.

        extra: a scalar on the device, which comes along. What was started before must be finished.
        """
        self._coming = self._sent(step, extra)
        del self._numbers[: len(self._coming.sizes) - 1], self._paths[:-1]

    def finish(self) -> tuple[list[StepRecord], float]:
        """What was started, and the extra number; waits until both have come, not for later steps."""
        coming, self._coming = self._coming, None
        extra, additions, outcomes = coming.read()
        samples = [
            [sample for paths, numbers in zip(*own, strict=True) for sample in _samples(paths, numbers)]
            for own in zip(coming.paths, additions, strict=True)
        ]
        first = coming.step - len(coming.paths) + 1
        of_all = zip(*self._gather([samples]), strict=True)
        records = [
            StepRecord(first + index, *outcome, tuple(sample for own in of_processes for sample in own))
            for index, (outcome, of_processes) in enumerate(zip(outcomes, of_all, strict=True))
        ]
        return records, extra

    def unread(self) -> Callable[[], list[list[float]]]:
        """Loss and gradient norm of each closed step that `finish` has not given yet, when they are asked for."""
        comings = [self._coming] if self._coming is not None else []
        comings.append(self._sent(0, torch.zeros((), device=self._numbers[0].device if self._numbers else None)))
        return lambda: [outcome for coming in comings for outcome in coming.read()[2]]

    def _sent(self, step: int, extra: Tensor) -> _Coming:
        closed = self._paths[:-1]
        numbers = self._numbers[: sum(len(additions) + 1 for additions in closed)]
        numbers = [extra.detach().float().reshape(1), *numbers]
        return _Coming(step, closed, [len(each) for each in numbers], HostCopy(torch.cat(numbers)))


def _samples(paths: Sequence[Path], numbers: Tensor) -> list[SampleLoss]:
    rows, timesteps, losses = numbers.view(3, -1).tolist()
    return [SampleLoss(paths[int(row)], *values) for row, *values in zip(rows, timesteps, losses, strict=True)]
