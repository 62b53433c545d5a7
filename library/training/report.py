"""A page about a run that is over: one HTML file, which needs nothing else and no network."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from library.files import write_atomically
from library.plots import line_plot_svg
from library.training.history import RUN_PARTS, TIMESTEP_PARTS, PictureLoss, RunHistory, Sums

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("report.html")
# A picture shows the course of a curve; more points than it has pixels only make the page larger.
_MOST_POINTS = 500
_MOST_PICTURES = 500
_MOST_SAMPLINGS = 12
_CHARTS = {
    "Loss": ("loss/current", "loss/average", "loss/epoch_average"),
    "Validation": ("loss/validation",),
    "Learning rate": ("lr",),
    "Gradient and weights": ("norm",),
    "Seconds a step": ("time/seconds_per_step",),
}

Series = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class AdapterHealth:
    """What the saved adapter is: in words, its problems, and the size of its changes by block."""

    description: str
    problems: Sequence[str]
    norms: Mapping[str, float]


def write_report(
    path: Path,
    title: str,
    outcome: str,
    history: RunHistory,
    settings: Mapping[str, Any],
    health: AdapterHealth | None,
) -> None:
    """Writes the page. outcome: how the run ended. settings: as JSON can hold them; unset ones are left out.

    health: None where no adapter was saved at the end.
    """
    sections = {
        "Alerts": _alerts(history),
        "Curves": _charts(history),
        "Samples": _samples(history.samples),
        "Pictures": _pictures(history.pictures()),
        "Adapter": [] if health is None else _health(health),
        "Settings": _settings(settings),
    }
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        summary=escape(_summary(outcome, history)),
        sections="\n".join(
            f'<section id="{name.lower()}"><h2>{name}</h2>\n{body}\n</section>'
            for name, lines in sections.items()
            if (body := "\n".join(lines))
        ),
    )
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def try_report(
    path: Path,
    title: str,
    outcome: str,
    history: RunHistory,
    settings: Mapping[str, Any],
    inspect: Callable[[], tuple[str, Sequence[str], Mapping[str, float]]] | None,
) -> None:
    """`write_report`; where it fails, that is told, and nothing else comes of it.

    inspect: gives what `AdapterHealth` holds; None where no adapter was saved at the end.
    """
    try:
        health = None if inspect is None else AdapterHealth(*inspect())
        write_report(path, title, outcome, history, settings, health)
        logger.info("report: %s", path.resolve())
    except Exception as error:
        logger.warning("the report is left out: %s: %s", type(error).__name__, error)


def _summary(outcome: str, history: RunHistory) -> str:
    points = history.points.get("loss/average", [])
    if not points:
        return outcome
    step, average = points[-1]
    return f"{outcome} after {step} of {history.total_steps} steps; average loss {average:.4f}"


def _alerts(history: RunHistory) -> Iterator[str]:
    alerts = [event for event in history.events if event.kind == "alert"]
    if not alerts:
        yield "<p>None.</p>"
        return
    yield '<ul class="scroll alert">'
    yield from (f"<li>step {alert.step}: {escape(alert.text)}</li>" for alert in alerts)
    yield "</ul>"


def _charts(history: RunHistory) -> Iterator[str]:
    yield '<div class="charts">'
    for title, starts in _CHARTS.items():
        if series := _series(history, starts):
            yield line_plot_svg(title, "step", series)
    if by_timestep := _by_timestep(history.by_run_part):
        yield line_plot_svg("Loss by timestep (1 is noise)", "timestep", by_timestep)
    yield "</div>"


def _series(history: RunHistory, starts: Iterable[str]) -> Series:
    """The curves of these names, and of those below them, as far as they have finite values."""
    series = {
        name: _thinned([(step, value) for step, value in points if math.isfinite(value)])
        for start in starts
        for name, points in history.points.items()
        if name == start or name.startswith(f"{start}/")
    }
    return {name: points for name, points in series.items() if points}


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


def _samples(samples: Mapping[str, Mapping[int, Image.Image]]) -> Iterator[str]:
    """A row for each prompt, a column for each sampling; of many samplings some, the first and the last with them."""
    steps = sorted({step for row in samples.values() for step in row})
    if not steps:
        return
    last = len(steps) - 1
    columns = min(len(steps), _MOST_SAMPLINGS)
    shown = sorted({steps[round(last * column / max(1, columns - 1))] for column in range(columns)})
    yield '<div class="samples"><table>'
    yield "<tr><th></th>" + "".join(f"<th>step {step}</th>" for step in shown) + "</tr>"
    for name, row in samples.items():
        cells = (_picture(row[step]) if step in row else "" for step in shown)
        yield f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"


def _picture(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _pictures(pictures: Sequence[PictureLoss]) -> Iterator[str]:
    if not pictures:
        return
    yield (
        '<p class="note">Worst first. Against usual: the loss over that of all pictures at the same timesteps. '
        "Well above 1, the caption may not fit, or the picture differs from all others.</p>"
    )
    yield '<div class="scroll"><table><tr><th>picture</th><th>samples</th><th>loss</th><th>against usual</th></tr>'
    for picture in pictures[:_MOST_PICTURES]:
        yield _row(
            f"{picture.path.parent.name}/{picture.path.name}",
            (str(picture.samples), f"{picture.loss:.4f}", f"{picture.against_usual:.3f}"),
        )
    yield "</table></div>"
    if len(pictures) > _MOST_PICTURES:
        yield f'<p class="note">and {len(pictures) - _MOST_PICTURES} more.</p>'


def _health(health: AdapterHealth) -> Iterator[str]:
    yield f"<p>{escape(health.description)}. Problems: {len(health.problems) or 'none'}.</p>"
    if health.problems:
        yield '<ul class="alert">' + "".join(f"<li>{escape(problem)}</li>" for problem in health.problems) + "</ul>"
    yield '<p class="note">How much it changes each block: the norm of the changes to its weights.</p>'
    yield '<div class="scroll"><table>'
    largest = max(health.norms.values(), default=0.0) or 1.0
    for block, norm in health.norms.items():
        bar = f'<meter value="{norm / largest:.3f}"></meter>'
        yield f'<tr><td>{escape(block)}</td><td class="number">{norm:.4g}</td><td>{bar}</td></tr>'
    yield "</table></div>"


def _settings(settings: Mapping[str, Any]) -> Iterator[str]:
    yield '<div class="scroll"><table>'
    for name, value in settings.items():
        if value is not None:
            yield _row(name, (), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    yield "</table></div>"


def _row(name: str, numbers: Iterable[str], text: str | None = None) -> str:
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    last = "" if text is None else f"<td>{escape(text)}</td>"
    return f"<tr><td>{escape(name)}</td>{cells}{last}</tr>"
