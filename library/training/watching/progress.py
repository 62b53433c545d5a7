"""How fast a run goes, and what it writes of its course for scripts."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from library.training.watching.sinks import Sink

PROGRESS_FILE = "progress.jsonl"

# The speed is that over so many log points: with saves and sampling in it, which the rest of the run has as well.
_LOG_POINTS = 20


class Pace:
    """Speed and time left, from the times of log points. The first is the beginning: models warm up before it.

    seconds_per_step: as of the last log point; None before the second.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self.seconds_per_step: float | None = None
        self._points: deque[tuple[int, float]] = deque(maxlen=_LOG_POINTS)

    def values(self, step: int) -> dict[str, float]:
        """Seconds a step and left at a log point after `step` steps; nothing at the first, or again at the same."""
        if self._points and self._points[-1][0] == step:
            return {}
        self._points.append((step, self._clock()))
        (first_step, first_time), (last_step, last_time) = self._points[0], self._points[-1]
        if last_step <= first_step:
            return {}
        seconds = self.seconds_per_step = (last_time - first_time) / (last_step - first_step)
        return {"time/seconds_per_step": seconds, "time/seconds_left": seconds * (self._total_steps - step)}


def closing_line(step: int, seconds_per_step: float | None, device: torch.device) -> str:
    """What a run tells of itself when it ends after `step` steps."""
    line = f"trained up to step {step}"
    if seconds_per_step is not None:
        line += f", {seconds_per_step:.3g} s a step"
    if device.type == "cuda":
        line += f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return line


class ProgressFile(Sink):
    """A line of JSON for each log point and event, readable while the run goes on."""

    def __init__(self, folder: Path, total_steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / PROGRESS_FILE).open("a", encoding="utf-8")
        self._total_steps = total_steps

    def log(self, values: Mapping[str, float], step: int) -> None:
        # JSON has neither NaN nor infinity.
        self._write("log", step, {name: value if math.isfinite(value) else None for name, value in values.items()})

    def event(self, kind: str, step: int, text: str) -> None:
        self._write(kind, step, {"text": text})

    def close(self) -> None:
        self._file.close()

    def _write(self, kind: str, step: int, more: Mapping[str, Any]) -> None:
        line = {"event": kind, "time": round(time.time(), 3), "step": step, "total_steps": self._total_steps, **more}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()
