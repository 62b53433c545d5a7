"""A page about a run that is over: one HTML file, which needs nothing else and no network."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from library.console import readable_time
from library.files import write_atomically
from library.training.watching.history import PictureLoss, RunHistory
from library.training.watching.report_charts import VALIDATION, charts
from library.training.watching.samples import BASE, SAMPLE, SHEET

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("report.html")
_MOST_PICTURES = 500
_MOST_SAMPLINGS = 12


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
    chosen: Collection[str],
    health: AdapterHealth | None,
) -> None:
    """Writes the page. outcome: how the run ended. settings: as JSON can hold them; unset ones are left out.

    chosen: names of the settings that somebody set. health: None where no adapter was
    saved at the end.
    """
    sections = {
        "Alerts": _alerts(history),
        "Curves": charts(history),
        "Samples": _samples(history),
        "Pictures": _pictures(history.pictures()),
        "Adapter": [] if health is None else _health(health),
        "Settings": _settings(settings, chosen),
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
    folder: Path,
    name: str,
    outcome: str,
    history: RunHistory,
    settings: Mapping[str, Any],
    chosen: Collection[str],
    inspect: Callable[[Path], tuple[str, Sequence[str], Mapping[str, float]]] | None,
) -> None:
    """`write_report` into <name>_report.html; where it fails, that is told, and nothing else comes of it.

    inspect: gives what `AdapterHealth` holds of the adapter file; None where none was saved at the end.
    """
    path = folder / f"{name}_report.html"
    try:
        health = None if inspect is None else AdapterHealth(*inspect(folder / f"{name}.safetensors"))
        write_report(path, name, outcome, history, settings, chosen, health)
        logger.info("report: %s", path.resolve())
    except Exception as error:
        logger.warning("the report is left out: %s: %s", type(error).__name__, error)


def _summary(outcome: str, history: RunHistory) -> str:
    points = history.points.get("loss/average", [])
    if not points:
        return outcome
    step, average = points[-1]
    taken = readable_time(time.monotonic() - history.started_at)
    text = f"{outcome} after {step} of {history.total_steps} steps and {taken}; average loss {average:.4f}"
    measured = [point for point in history.points.get(f"{VALIDATION}average", []) if math.isfinite(point[1])]
    if measured:
        step, least = min(measured, key=lambda point: point[1])
        text += f"; least validation loss {least:.4f}, after step {step}"
    return text


def _alerts(history: RunHistory) -> Iterator[str]:
    alerts = [event for event in history.events if event.kind == "alert"]
    if not alerts:
        yield "<p>None.</p>"
        return
    yield '<ul class="scroll alert">'
    yield from (f"<li>step {alert.step}: {escape(alert.text)}</li>" for alert in alerts)
    yield "</ul>"


def _samples(history: RunHistory) -> Iterator[str]:
    """A row for each prompt, a column for each sampling; of many samplings some, the first and the last with them.

    Pictures of the base model stand before all others.
    """
    names = [name for name in history.samples if name.startswith(SAMPLE) and name != SHEET]
    steps = sorted({step for name in names for step in history.samples[name]})
    if not steps:
        return
    bases = {name: history.samples.get(BASE + name.removeprefix(SAMPLE), {}) for name in names}
    has_base, last, columns = any(bases.values()), len(steps) - 1, min(len(steps), _MOST_SAMPLINGS)
    shown = sorted({steps[round(last * column / max(1, columns - 1))] for column in range(columns)})
    heads = ["base model"] * has_base + [f"step {step}" for step in shown]
    yield '<div class="samples"><table>'
    yield "<tr><th></th>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
    for name in names:
        pictures = [next(iter(bases[name].values()), None)] * has_base
        pictures += [history.samples[name].get(step) for step in shown]
        cells = "".join(f"<td>{'' if picture is None else _picture(picture)}</td>" for picture in pictures)
        yield f'<tr><th class="prompt">{escape(history.prompts.get(name, name))}</th>{cells}</tr>'
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


def _settings(settings: Mapping[str, Any], chosen: Collection[str]) -> Iterator[str]:
    """What was chosen, and, folded away, what is as by default. Datasets are always of the first kind."""
    told = {name: value for name, value in settings.items() if value is not None}
    own = {name: value for name, value in told.items() if name in chosen or name == "datasets"}
    yield from _table_of_settings(own)
    yield "<details><summary>Those left at their defaults</summary>"
    yield from _table_of_settings({name: value for name, value in told.items() if name not in own})
    yield "</details>"


def _table_of_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    yield "<table>"
    for name, value in settings.items():
        yield _row(name, (), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    yield "</table>"


def _row(name: str, numbers: Iterable[str], text: str | None = None) -> str:
    cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
    last = "" if text is None else f"<td>{escape(text)}</td>"
    return f"<tr><td>{escape(name)}</td>{cells}{last}</tr>"
