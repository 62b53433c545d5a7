"""What a run's report is made of, gathered while the run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from library.training.watching.sinks import Sink

if TYPE_CHECKING:
    from library.training.step_records import StepRecord

# A flow's loss depends on t more than on anything else: losses are compared within a tenth of [0, 1].
TIMESTEP_PARTS = 10
# Parts of the run whose losses by timestep are told apart.
RUN_PARTS = 4
# Sample pictures are kept at no more pixels than this on the longer side.
THUMBNAIL_SIDE = 256


@dataclass
class Sums:
    """Samples whose timesteps lie near each other: their number, and the sum of their losses."""

    count: int = 0
    total: float = 0.0

    def add(self, loss: float) -> None:
        """One more."""
        self.count += 1
        self.total += loss

    @property
    def mean(self) -> float:
        """The mean loss; NaN of nothing."""
        return self.total / self.count if self.count else math.nan


@dataclass(frozen=True)
class PictureLoss:
    """How a picture was learnt. against_usual: its losses over the mean ones at their timesteps, on average."""

    path: Path
    samples: int
    loss: float
    against_usual: float


@dataclass(frozen=True)
class Event:
    """Something that happened after `step` steps."""

    kind: str
    step: int
    text: str


@dataclass
class RunHistory(Sink):
    """Keeps curves and events, sample pictures made small, and losses by picture and timestep.

    samples: by name and step. prompts: by name, as far as they are known. started_at: by time.monotonic().
    by_picture: for each picture, its losses in each tenth of the timesteps. by_run_part: of each quarter of the run.
    """

    total_steps: int
    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    samples: dict[str, dict[int, Image.Image]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)
    started_at: float = field(default_factory=time.monotonic)
    by_picture: dict[Path, list[Sums]] = field(default_factory=dict)
    by_run_part: list[list[Sums]] = field(default_factory=lambda: [_tenths() for _ in range(RUN_PARTS)])

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.points.setdefault(name, []).append((step, value))

    def log_image(self, name: str, picture: Image.Image, step: int, text: str = "") -> None:
        small = picture.convert("RGB")
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        self.samples.setdefault(name, {})[step] = small
        if text:
            self.prompts[name] = text.partition("\n")[0]

    def event(self, kind: str, step: int, text: str) -> None:
        self.events.append(Event(kind, step, text))

    def look(self, records: Sequence[StepRecord]) -> None:
        for record in records:
            part = min(RUN_PARTS * (record.step - 1) // self.total_steps, RUN_PARTS - 1)
            for sample in record.samples:
                if math.isfinite(sample.loss):
                    tenth = min(int(sample.timestep * TIMESTEP_PARTS), TIMESTEP_PARTS - 1)
                    self.by_picture.setdefault(sample.path, _tenths())[tenth].add(sample.loss)
                    self.by_run_part[part][tenth].add(sample.loss)

    def pictures(self) -> list[PictureLoss]:
        """Every picture that was trained, worst first."""
        usual = [
            sum(part[tenth].total for part in self.by_run_part)
            / max(1, sum(part[tenth].count for part in self.by_run_part))
            for tenth in range(TIMESTEP_PARTS)
        ]
        found = [_picture_loss(path, tenths, usual) for path, tenths in self.by_picture.items()]
        return sorted(found, key=lambda picture: -picture.against_usual)


def _tenths() -> list[Sums]:
    return [Sums() for _ in range(TIMESTEP_PARTS)]


def _picture_loss(path: Path, tenths: Sequence[Sums], usual: Sequence[float]) -> PictureLoss:
    samples = sum(tenth.count for tenth in tenths)
    ratios = sum(tenth.total / mean for tenth, mean in zip(tenths, usual, strict=True) if mean > 0)
    return PictureLoss(path, samples, sum(tenth.total for tenth in tenths) / samples, ratios / samples)
