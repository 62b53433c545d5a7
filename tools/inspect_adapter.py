"""Shows what an adapter file holds and whether it is sound; with two files, how they differ. Reads only.

    python tools/inspect_adapter.py FILE [FILE2] [--json]

The exit code is 1 for a file with problems: NaN or infinity, keys that belong to no module, incomplete adapters,
nothing but zeros, and keys or strengths that ComfyUI would not read as they are meant. DoRA's change depends on the
base model's weights; its norms here are of the factors' product alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.console import show, show_error
from library.errors import UserError, first_ten
from networks.adapter_files import open_adapter_file
from networks.adapter_report import (
    BLOCK,
    PARTS,
    AdapterReport,
    ModuleReport,
    inspect_adapter,
    norms_by_block,
)
from networks.network import part_of
from tools.adapter_comparison import SAME, Comparison, compare_adapters

BAR_WIDTH = 40
_TOLD_METADATA = re.compile(
    r"ss_(output_name|network_(module|dim|alpha|args)|base_model_version|anima_depth|sd_model_name|steps|epoch|"
    r"learning_rate|optimizer|resolution|num_train_images|training_comment|sd_scripts_commit_hash)"
    r"|modelspec\.(title|architecture|resolution|date|trigger_phrase)|sshs_model_hash|merged_adapters"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 for sound files, 1 for problems or after an error was shown."""
    arguments = _parse(argv)
    try:
        files = [
            open_adapter_file(path, strict=False) for path in (arguments.file, arguments.other) if path is not None
        ]
        reports = [inspect_adapter(file) for file in files]
        comparison = compare_adapters(*files) if len(files) == 2 else None
    except UserError as error:
        show_error(error)
        return 1
    if arguments.json:
        everything = {"files": [asdict(report) for report in reports], "comparison": comparison and asdict(comparison)}
        show(json.dumps(everything, indent=2))
    else:
        for report in reports:
            show("\n".join(_report_lines(report)))
        if comparison is not None:
            show("\n".join(_comparison_lines(comparison)))
    return 1 if any(report.problems for report in reports) else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Show what an adapter file holds, or how two differ.")
    parser.add_argument("file", type=Path, help="adapter file (.safetensors)")
    parser.add_argument("other", type=Path, nargs="?", help="a second one, to compare with")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, all metadata with it")
    return parser.parse_args(argv)


def _report_lines(report: AdapterReport) -> Iterator[str]:
    yield f"{report.file} ({report.size / 2**20:.1f} MiB, {' and '.join(report.dtypes)}, names as {report.format})"
    yield f"  holds: {report.description or 'no whole adapter'}"
    yield f"  strength (alpha / rank): {_strengths(report.modules)}"
    yield "  targets:"
    yield from (f"    {line}" for line in _target_lines(report.modules))
    changes = {path: module.norm or 0.0 for path, module in report.modules.items()}
    norms = {path: changes.pop(path) for path, found in report.types.items() if found.kind == "norm"}
    yield "  ‖ΔW‖ by block:"
    yield from _bars(norms_by_block(changes))
    yield "  modules by ‖ΔW‖:"
    yield from _bars(_histogram(changes))
    if norms:
        yield f"  norm weights: {len(norms)}, together changed by {math.hypot(*norms.values()):.4g}"
    unchanging = [path for path, module in report.modules.items() if module.changes_nothing]
    if unchanging:
        yield f"  zero, changing nothing: {len(unchanging)} modules: {first_ten(unchanging)}"
    if any(found.dora for found in report.types.values()):
        yield "  DoRA: its change depends on the base model; the norms above are of the factors' product alone"
    yield "  metadata:"
    told = {key: value for key, value in report.metadata.items() if _TOLD_METADATA.fullmatch(key)}
    yield from (f"    {key}: {value if len(value) <= 100 else value[:97] + '...'}" for key, value in told.items())
    yield f"    {len(report.metadata) - len(told)} more with --json"
    yield f"  problems: {len(report.problems) or 'none'}"
    if report.problems:
        yield "    " + first_ten(report.problems, "\n    ")


def _strengths(modules: Mapping[str, ModuleReport]) -> str:
    counts = Counter(module.strength for module in modules.values() if module.strength is not None)
    listed = [f"{strength:g} in {count} modules" for strength, count in counts.most_common()]
    return first_ten(listed) or "none"


def _target_lines(modules: Mapping[str, ModuleReport]) -> Iterator[str]:
    """Blocks with the same modules share a line: "transformer blocks 0-27: mlp.layer1, mlp.layer2"."""
    blocks: dict[tuple[int, int], list[str]] = {}
    for path in modules:
        match = BLOCK.fullmatch(path)
        if match is None:
            yield path
        else:
            blocks.setdefault((PARTS.index(part_of(path)), int(match[1])), []).append(match[2])
    alike: dict[tuple[int, str], list[int]] = {}
    for (part, number), names in sorted(blocks.items()):
        alike.setdefault((part, _short_form(names)), []).append(number)
    for (part, names), numbers in alike.items():
        yield f"{PARTS[part]} blocks {_ranges(numbers)}: {names}"


def _short_form(names: Iterable[str]) -> str:
    """mlp.layer1, mlp.layer2, norm_mlp -> "mlp.(layer1 layer2), norm_mlp"."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        group, _, rest = name.partition(".")
        groups.setdefault(group, []).append(rest)
    return ", ".join(f"{group}.({' '.join(rests)})" if rests[0] else group for group, rests in groups.items())


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"; numbers ascend."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _histogram(norms: Mapping[str, float]) -> dict[str, float]:
    """How many modules have a norm in each doubling: {"0.25 to 0.5": 3}."""
    exponents = Counter(math.floor(math.log2(norm)) for norm in norms.values() if norm)
    if not exponents:
        return {}
    return {
        f"{2.0**exponent:.3g} to {2.0 ** (exponent + 1):.3g}": exponents[exponent]
        for exponent in range(min(exponents), max(exponents) + 1)
    }


def _bars(values: Mapping[str, float]) -> Iterator[str]:
    """A line for each value, its bar against the largest."""
    longest = max(values.values(), default=0.0) or 1.0
    for name, value in values.items():
        yield f"    {name:<20} {value:>10.4g}  {'#' * round(BAR_WIDTH * value / longest)}".rstrip()


def _comparison_lines(comparison: Comparison) -> Iterator[str]:
    yield "comparison, of the second file with the first:"
    for part, found in comparison.parts.items():
        if found.cosine is None:
            yield f"  {part}: {found.modules} modules in both, one of them all zero"
        else:
            yield (
                f"  {part}: {found.modules} modules in both, "
                f"cosine similarity {found.cosine:.6f}, norm ratio {found.norm_ratio:.6g}"
            )
    differing = sorted(comparison.differing.items(), key=lambda item: -item[1])
    listed = first_ten(f"{path} ({difference:.2g})" for path, difference in differing)
    yield f"  differ (by more than {SAME:g} of the longer): {len(differing)} modules{': ' if listed else ''}{listed}"
    for title, paths in (
        ("only in the first", comparison.only_first),
        ("only in the second", comparison.only_second),
        ("not comparable: other shapes, not whole or finite, DoRA or absolute norms", comparison.incomparable),
    ):
        if paths:
            yield f"  {title}: {len(paths)} modules: {first_ten(paths)}"


if __name__ == "__main__":
    sys.exit(main())
