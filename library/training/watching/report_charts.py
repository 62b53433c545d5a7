"""The charts of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from library.plots import line_plot_svg
from library.training.watching.history import RUN_PARTS, TIMESTEP_PARTS, RunHistory, Sums

# A picture shows the course of a curve; more points than it has pixels only make the page larger.
_MOST_POINTS = 500
VALIDATION = "loss/validation/"
# The curves of each chart: those whose names match.
_CHARTS = {
    "Loss": ("loss/current", "loss/average", "loss/epoch_average"),
    "Validation": tuple(VALIDATION + name for name in ("average", "trained_pictures", "gap")),
    "Validation by timestep (1 lies nearest to the picture)": (f"{VALIDATION}timestep_*",),
    "Learning rate": ("lr/*",),
    "Gradient and weights": ("norm/*",),
    "Seconds a step": ("time/seconds_per_step",),
}

Series = Mapping[str, Sequence[tuple[float, float]]]


def charts(history: RunHistory) -> Iterator[str]:
    """As lines of HTML."""
    yield '<div class="charts">'
    for title, patterns in _CHARTS.items():
        if series := _series(history, patterns):
            yield line_plot_svg(title, "step", _by_last_name(series))
    if by_timestep := _by_timestep(history.by_run_part):
        yield line_plot_svg("Loss by timestep (1 is noise)", "timestep", by_timestep)
    yield "</div>"


def _series(history: RunHistory, patterns: Iterable[str]) -> Series:
    """The curves whose names match, as far as they have finite values."""
    series = {
        name: _thinned([(step, value) for step, value in points if math.isfinite(value)])
        for pattern in patterns
        for name, points in history.points.items()
        if fnmatchcase(name, pattern)
    }
    return {name: points for name, points in series.items() if points}


def _by_last_name(series: Series) -> Series:
    """The same curves by the last part of their names, where those differ: it is what a legend has room for."""
    short = {name.rpartition("/")[2]: points for name, points in series.items()}
    return short if len(short) == len(series) else series


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """Every n-th point, and the last."""
    every = math.ceil(len(points) / _MOST_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def _by_timestep(parts: Sequence[Sequence[Sums]]) -> Series:
    """The mean loss in each tenth of the timesteps, for each quarter of the run."""
    series = {
        f"{100 * number // RUN_PARTS} to {100 * (number + 1) // RUN_PARTS} % of the run": [
            ((index + 0.5) / TIMESTEP_PARTS, tenth.mean) for index, tenth in enumerate(tenths) if tenth.count
        ]
        for number, tenths in enumerate(parts)
    }
    return {name: points for name, points in series.items() if points}
