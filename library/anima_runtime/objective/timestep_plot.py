"""A picture of the timesteps that a run will train at."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from library.anima_runtime.objective.flow import SampleKey
from library.anima_runtime.objective.timesteps import TimestepSettings, draw_timestep
from library.plots import save_histogram

logger = logging.getLogger(__name__)

# Enough for a smooth picture of 50 bars; a timestep takes 0.05 to 0.2 ms.
_MOST = 20_000


def save_timestep_histogram(
    path: Path, samples: Iterable[tuple[SampleKey, tuple[int, int], int]], seed: int, settings: TimestepSettings
) -> None:
    """Draws a histogram of the timesteps of the samples, of which the first 20,000 count.

    samples: (key, (width, height), offset) of each use of a picture. Raises UserError when the file cannot be written.
    """
    drawn = [draw_timestep(key, seed, settings, size, offset) for key, size, offset in islice(samples, _MOST)]
    mean = sum(drawn) / len(drawn)
    title = f"Timesteps of {len(drawn)} samples, {mean:.3f} on average"
    save_histogram(path, title, "t: 0 is the picture, 1 is noise", drawn)
    logger.info("%s: %s", title, path.resolve())
