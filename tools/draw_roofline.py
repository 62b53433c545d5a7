"""Draws what a step reaches of what the GPU can do, from the benchmark's lines and one profile:

    python tools/benchmark_training.py lora lora_512 --profile profile.json > lines.jsonl
    python tools/draw_roofline.py --lines lines.jsonl --profile profile.json --case lora --output docs/roofline.png

Top left: each matrix product and attention of the case's step, by its work for each byte that it must move, under the
roof of the measured speed of memory and of a large product. Top right: each case's time, and the least that its
work takes at that speed. Bottom: what the case's time goes to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from library.console import show, show_error
from library.errors import UserError
from library.plots import save_figure
from tools.benchmark_training import read_lines
from tools.kernel_profile import THIN_SIDE

_COLOURS = {
    "large products": "#1f77b4",
    "thin products": "#ff7f0e",
    "attention": "#2ca02c",
    "attention backward": "#98df8a",
}
# By the first word of a kind; others are grey.
_KIND_COLOURS = {
    "large": "#1f77b4",
    "thin": "#ff7f0e",
    "attention": "#2ca02c",
    "elementwise": "#9467bd",
    "copies": "#8c564b",
    "optimizer": "#e377c2",
    "exchange": "#bcbd22",
}
# A point of this area, in square points, takes a tenth of the step.
_AREA_OF_TENTH = 150


def points_of(products: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """By group: (FLOP for each byte, TFLOP/s, ms) of each shape."""
    groups: dict[str, list[tuple[float, float, float]]] = {name: [] for name in _COLOURS}
    for product in products:
        if product["ms"] > 0:
            intensity = 1000 * product["teraflop"] / product["gigabyte"]
            groups[_group(product)].append((intensity, 1000 * product["teraflop"] / product["ms"], product["ms"]))
    return groups


def _group(product: Mapping[str, Any]) -> str:
    if product["kind"] != "product":
        return product["kind"]
    return "thin products" if min(product["shape"]) <= THIN_SIDE else "large products"


def draw(lines: Sequence[Mapping[str, Any]], profile: Mapping[str, Any], case: str) -> Figure:
    """The whole picture. lines: those with a floor, which need a GPU; the case's own is among them."""
    own = next(line for line in lines if line["case"] == case)
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    figure.suptitle(f"A training step on one {own['gpu']}")
    places = figure.add_gridspec(2, 2, height_ratios=(5, 1.3), width_ratios=(1.25, 1))
    _draw_roof(figure.add_subplot(places[0, 0]), profile, own)
    _draw_cases(figure.add_subplot(places[0, 1]), lines)
    _draw_kinds(figure.add_subplot(places[1, :]), profile, case)
    return figure


def _draw_roof(axes: Axes, profile: Mapping[str, Any], line: Mapping[str, Any]) -> None:
    peak, bandwidth = line["ceiling_tflops"], line["ceiling_gb_s"]
    groups = points_of(profile["products"])
    found = [point for points in groups.values() for point in points]
    left, right = 0.5 * min(point[0] for point in found), 3 * max(1000 * peak / bandwidth, *(p[0] for p in found))
    corner = 1000 * peak / bandwidth
    axes.plot([left, corner, right], [left * bandwidth / 1000, peak, peak], color="black", linewidth=1.2)
    axes.annotate(f"{peak:.0f} TFLOP/s", (right, peak), xytext=(0, 4), textcoords="offset points", ha="right")
    middle = (left * corner) ** 0.5
    axes.annotate(f"{bandwidth / 1000:.1f} TB/s", (middle, middle * bandwidth / 1000), xytext=(-8, 4),
                  textcoords="offset points", ha="right")  # fmt: skip
    for name, points in groups.items():
        if points:
            areas = [10 * _AREA_OF_TENTH * ms / profile["busy_ms"] + 4 for _, _, ms in points]
            label = f"{name}: {sum(ms for _, _, ms in points):.1f} ms"
            axes.scatter(*list(zip(*points, strict=True))[:2], s=areas, color=_COLOURS[name], alpha=0.7, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte (operands and result moved once)",
             ylabel="TFLOP/s", title=f"{line['case']}: products by shape, area by time")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    legend = axes.legend(loc="lower right")
    for handle in legend.legend_handles:
        handle.set_sizes([40])


def _draw_cases(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    names = [line["case"] for line in lines]
    axes.barh(names, [line["ms_median"] for line in lines], color="#c6dbef", label="measured")
    floors = [line["floor_ms"] for line in lines]
    axes.barh(names, floors, color="#1f77b4", label="what its work takes at the ceiling")
    for place, line in enumerate(lines):
        text = f" {line['ms_median']:.1f} ms, {line['share_of_ceiling']:.0%}"
        axes.annotate(text, (line["ms_median"], place), va="center")
    axes.invert_yaxis()
    axes.set_xlim(right=1.35 * max(line["ms_median"] for line in lines))
    axes.set(xlabel="ms a step", title="Cases: time, and share of the ceiling")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def _draw_kinds(axes: Axes, profile: Mapping[str, Any], case: str) -> None:
    start = 0.0
    for kind in profile["kinds"]:
        colour = _KIND_COLOURS.get(kind["kind"].partition(" ")[0].rstrip(","), "#aaaaaa")
        label = f"{kind['kind']}: {kind['ms']:.1f} ms, {kind['kernels']} kernels"
        axes.barh([case], [kind["ms"]], left=start, color=colour, label=label)
        start += kind["ms"]
    axes.set(xlabel="ms of the GPU's work in a step", xlim=(0, start), yticks=[])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=3, frameon=False, fontsize="small")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after an error was shown."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=Path, required=True, help="What tools/benchmark_training.py printed.")
    parser.add_argument("--profile", type=Path, required=True, help="What its --profile wrote.")
    parser.add_argument("--case", default="lora", help="The case of the profile that is drawn.")
    parser.add_argument("--output", type=Path, required=True, help="The picture, such as docs/roofline.png.")
    arguments = parser.parse_args(argv)
    try:
        lines = [line for line in read_lines(arguments.lines) if "floor_ms" in line]
        profile = json.loads(arguments.profile.read_text(encoding="utf-8")).get(arguments.case)
        if profile is None or arguments.case not in [line["case"] for line in lines]:
            raise UserError(f"--case {arguments.case}: it is not both in {arguments.lines} and {arguments.profile}")
        save_figure(draw(lines, profile, arguments.case), arguments.output)
    except (UserError, OSError, ValueError) as error:
        show_error(error)
        return 1
    show(str(arguments.output.resolve()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
