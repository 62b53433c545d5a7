"""Pictures of curves and distributions, without pyplot and its global state.

Matplotlib is imported when something is drawn: a run's start need not wait half a second for it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save_line_plot(path: Path, title: str, x_label: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draws one line for each named series of (x, y) points; with several, their names stand in a legend.

    Raises UserError when the file cannot be written, or its ending is no picture format.
    """
    save_figure(_line_plot(title, x_label, series), path)


def line_plot_svg(title: str, x_label: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The same as an <svg> element for a page, whose text the browser draws."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        _line_plot(title, x_label, series).savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save_histogram(path: Path, title: str, x_label: str, values: Sequence[float], bins: int = 50) -> None:
    """Draws how often values fall into `bins` intervals of equal width.

    Raises UserError when the file cannot be written, or its ending is no picture format.
    """
    figure, axes = _labelled_axes(title, x_label)
    axes.hist(values, bins=bins)
    axes.set_ylabel(f"of {len(values)}")
    save_figure(figure, path)


def _line_plot(title: str, x_label: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    figure, axes = _labelled_axes(title, x_label)
    for name, points in series.items():
        axes.plot([x for x, _ in points], [y for _, y in points], label=name)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    if len(series) > 1:
        axes.legend()
    return figure


def _labelled_axes(title: str, x_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label)
    axes.grid(alpha=0.3)
    axes.ticklabel_format(scilimits=(-3, 5))
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as the kind of picture that the path ends with; UserError where that fails."""
    try:
        write_atomically(path, figure.savefig)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the picture cannot be written: {error}") from error
