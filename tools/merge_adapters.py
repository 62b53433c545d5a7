"""Merges adapters, each with a strength, into one adapter or into a checkpoint.

    python tools/merge_adapters.py --adapters A.safetensors B.safetensors --weights 1.0 0.5 --output OUT.safetensors
    python tools/merge_adapters.py --adapters A.safetensors --checkpoint ANIMA.safetensors --output MERGED.safetensors

Into one adapter: a module that one file changes keeps its type; LoRA and LoRA become one with the ranks of both; norms
and plain differences are added. These are exact. Other sums (LoKr with LoRA, LoKr with LoKr, LoHa) need --rank N: the
nearest LoRA of that rank. Sums of LoRA are cut to --rank as well, where it is given.

Into a checkpoint: any types, DoRA in ComfyUI's arithmetic; summed in float32 and rounded once to the checkpoint's own
number format. Every tensor and name of it stays. Text-encoder adapters are left out: they belong to Qwen3's file.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.console import progress_bar, show, show_error
from library.errors import ModelFileError, SettingError, UserError
from library.files import write_atomically
from library.model_hashes import BLANK_HASHES, fill_hashes
from networks.adapter_files import read_adapter_file, read_metadata
from networks.adapter_types import Adapters, describe_adapters, infer_types
from networks.checkpoint_merge import plan_merge
from networks.merging import merge_adapters
from tools.adapter_output import add_output_arguments, check_output, write_adapter
from tools.approximations import rank_metadata


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after an error was shown."""
    arguments = _parse(argv)
    try:
        check_output(arguments)
        weights = _checked_weights(arguments)
        if arguments.checkpoint is None:
            merge_into_one(arguments, weights)
        else:
            merge_into_model(arguments, weights)
    except UserError as error:
        show_error(error)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merge adapters into one adapter or into a checkpoint.")
    parser.add_argument("--adapters", type=Path, nargs="+", required=True, help="adapter files (.safetensors)")
    parser.add_argument("--weights", type=float, nargs="+", help="a strength for each adapter; unset: 1 for all")
    parser.add_argument("--checkpoint", type=Path, help="transformer file to merge into; unset: one adapter is made")
    parser.add_argument("--rank", help='"exact" (default), or the rank of what has no exact sum; for adapters only')
    add_output_arguments(parser)
    return parser.parse_args(argv)


def _checked_weights(arguments: argparse.Namespace) -> list[float]:
    weights = arguments.weights or [1.0] * len(arguments.adapters)
    if len(weights) != len(arguments.adapters):
        raise SettingError(f"--weights: {len(weights)} numbers for {len(arguments.adapters)} adapters; give one each")
    if any(weight == 0 or not math.isfinite(weight) for weight in weights):
        raise SettingError(f"--weights: {weights} has a number that is no strength; leave an adapter out instead of 0")
    return weights


def merge_into_one(arguments: argparse.Namespace, weights: Sequence[float]) -> None:
    """Raises UserError before anything is written."""
    rank = _checked_rank(arguments.rank)
    read = [read_adapter_file(path) for path in arguments.adapters]
    metadatas = [metadata for _, metadata in read]
    depths = {metadata["ss_anima_depth"] for metadata in metadatas if "ss_anima_depth" in metadata}
    if len(depths) > 1:
        raise ModelFileError(f"--adapters: they are for models of different depths: {', '.join(sorted(depths))} blocks")
    sources = [(adapters, weight) for (adapters, _), weight in zip(read, weights, strict=True)]
    modules = {path for adapters, _ in sources for path in adapters}
    with progress_bar(len(modules), "merging modules") as bar:
        merged = merge_adapters(sources, rank, bar.update)
    metadata = _metadata(arguments, weights, metadatas)
    metadata |= {key: value for key, value in _network_metadata(merged.adapters).items() if key in metadatas[0]}
    write_adapter(arguments, merged.adapters, metadata)
    show(f"{arguments.output}: {describe_adapters(merged.adapters)}; {_errors_text(merged.relative_errors)}")


def _checked_rank(text: str | None) -> int | None:
    if text in (None, "exact"):
        return None
    if not (text.isdecimal() and int(text) > 0):
        raise SettingError(f"--rank: {text!r} is no rank; give a whole number from 1, or exact")
    return int(text)


def _errors_text(relative_errors: Mapping[str, float]) -> str:
    if not relative_errors:
        return "no module is approximated"
    worst = max(relative_errors, key=relative_errors.__getitem__)
    return (
        f"{len(relative_errors)} modules approximated by LoRA, with a relative error of the difference of "
        f"{statistics.median(relative_errors.values()):.3g} in the median, {relative_errors[worst]:.3g} in {worst}"
    )


def merge_into_model(arguments: argparse.Namespace, weights: Sequence[float]) -> None:
    """Raises UserError before anything is written, but for values too large for the checkpoint's number format."""
    for name, unset in (("rank", None), ("format", "comfy"), ("precision", None)):
        if getattr(arguments, name) != unset:
            raise SettingError(f"--{name} is for merging into one adapter; leave it out with --checkpoint")
    merge = plan_merge(arguments.checkpoint, list(zip(arguments.adapters, weights, strict=True)))
    metadata = _metadata(arguments, weights, [read_metadata(arguments.checkpoint)])

    def write(file: Path) -> None:
        merge.write(file, metadata)
        fill_hashes(file)

    write_atomically(arguments.output, write)
    changed = {path for adapters, _ in merge.sources for path in adapters}
    show(f"{arguments.output}: {arguments.checkpoint.name} with {len(changed)} modules changed")
    if merge.left_out:
        show(f"not merged, as they belong to the text encoder's file: {len(merge.left_out)} modules")


def _metadata(
    arguments: argparse.Namespace, weights: Sequence[float], metadatas: Sequence[Mapping[str, str]]
) -> dict[str, str]:
    """What all files agree on and the first's modelspec, with blank hashes, and what was merged with which weights."""
    first = metadatas[0]
    merged = {
        key: value
        for key, value in first.items()
        if key.startswith("modelspec.") or all(other.get(key) == value for other in metadatas)
    }
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    renewed = {"modelspec.title": arguments.output.stem, "modelspec.date": now, **BLANK_HASHES}
    merged |= {key: value for key, value in renewed.items() if key in first}
    sources = zip(arguments.adapters, weights, strict=True)
    record = [{"file": path.name, "weight": weight} for path, weight in sources]
    return {**merged, "merged_adapters": json.dumps(record)}


def _network_metadata(adapters: Adapters) -> dict[str, str]:
    """Kohya's keys for the type, the rank and alpha of the sum."""
    kinds = {found.kind for found in infer_types(adapters).values()} & {"lora", "lokr", "loha"}
    module = f"networks.{kinds.pop()}_anima" if len(kinds) == 1 else "(several types)"
    return {"ss_network_module": module, **rank_metadata(adapters)}


if __name__ == "__main__":
    sys.exit(main())
