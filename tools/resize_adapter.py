"""Makes an adapter smaller: each module becomes the best approximation of a lower rank, at the same strength.

    python tools/resize_adapter.py --input IN.safetensors --output OUT.safetensors (--rank N | --energy 0.95)
        [--type same|lora] [--format comfy|kohya|diffusers] [--precision float|fp16|bf16]

--energy keeps, in each module, the least rank with this share of the squared singular values; --rank bounds it. LoRA
loses ranks, LoKr those of its w2 (a whole w2 becomes low-rank where that is smaller). --type lora turns LoKr, LoHa and
full differences of matrices into LoRA; LoHa can only be resized so. alpha / rank stays in every module, norms and
DoRA's scales go over unchanged, modules that have less than the rank as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor

from library.console import progress_bar, show, show_error
from library.errors import ModelFileError, SettingError, UserError
from networks.adapter_files import AdapterFile, open_adapter_file
from networks.adapter_types import NORM_VALUE, Adapters, adapter_kind, describe_adapters
from networks.approximation import Approximation, Limits, resize, to_lora
from tools.adapter_output import AdapterWriter, add_output_arguments, check_output
from tools.approximations import add_limit_arguments, limits_of, rank_metadata, show_approximations


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after an error was shown."""
    arguments = _parse(argv)
    try:
        resize_file(arguments)
    except UserError as error:
        show_error(error)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make an adapter smaller by the best approximation of a lower rank.")
    parser.add_argument("--input", type=Path, required=True, help="adapter file (.safetensors)")
    add_limit_arguments(parser)
    parser.add_argument("--type", choices=("same", "lora"), default="same", help="lora: LoKr and LoHa become LoRA")
    add_output_arguments(parser)
    return parser.parse_args(argv)


def resize_file(arguments: argparse.Namespace) -> None:
    """Reads, resizes, writes and reports. Raises UserError before anything is written."""
    limits, as_lora = limits_of(arguments), arguments.type == "lora"
    check_output(arguments)
    source = open_adapter_file(arguments.input)
    for path, suffixes in source.modules.items():
        _check_resizable(path, suffixes, as_lora)
    with AdapterWriter(arguments) as writer:
        approximations = _resize(source, limits, as_lora, arguments.precision is None, writer)
        _check_rank(limits, approximations)
        writer.write(_new_metadata(source.own_metadata, writer.outline, arguments))
    show_approximations(approximations)
    carried_over = len(writer.outline) - len(approximations)
    show(f"{arguments.output}: {describe_adapters(writer.outline)}; {carried_over} modules carried over as they are")


def _resize(
    source: AdapterFile, limits: Limits, as_lora: bool, keep_formats: bool, writer: AdapterWriter
) -> dict[str, Approximation]:
    """Resizes module by module into the writer; returns what became of each that has a rank, without its tensors.

    keep_formats: new factors get the number format of the old ones. Raises ModelFileError for values that are not
    finite.
    """
    approximations = {}
    with progress_bar(len(source.modules), "resizing modules") as bar:
        for path in source.modules:
            own = source.module(path)
            if not all(tensor.isfinite().all() for tensor in own.values()):
                raise ModelFileError(
                    f"{path} has values that are not finite: its training broke. Take an earlier save."
                )
            found = _approximate(own, adapter_kind(path, own), limits, as_lora)
            resized = _replaced(own, found)
            writer.add(path, _as_stored(resized, own) if keep_formats else resized)
            if found is not None:
                approximations[path] = replace(found, tensors={})
            bar.update()
    return approximations


def _check_rank(limits: Limits, approximations: Mapping[str, Approximation]) -> None:
    if not approximations:
        raise SettingError("the adapter has no module with a rank (LoRA, LoKr), so there is nothing to resize")
    full_rank = max(found.full_rank for found in approximations.values())
    if limits.rank is not None and limits.rank > full_rank:
        raise SettingError(f"--rank {limits.rank}: no module has a rank above {full_rank}; resizing only makes smaller")


def _approximate(own: Mapping[str, Tensor], kind: str, limits: Limits, as_lora: bool) -> Approximation | None:
    """None for what goes over as it is."""
    becomes_lora = as_lora and (kind in ("lokr", "loha") or (own.keys() == {"diff"} and own["diff"].ndim == 2))
    if kind not in ("lora", "lokr") and not becomes_lora:
        return None
    factors = {suffix: tensor for suffix, tensor in own.items() if suffix != "dora_scale"}
    return (to_lora if becomes_lora else resize)(factors, limits)


def _replaced(own: dict[str, Tensor], found: Approximation | None) -> dict[str, Tensor]:
    """A module's new tensors, with the DoRA scales of the old."""
    if found is None:
        return own
    return {suffix: tensor for suffix, tensor in own.items() if suffix == "dora_scale"} | found.tensors


def _check_resizable(path: str, suffixes: Collection[str], as_lora: bool) -> None:
    if NORM_VALUE in suffixes:
        raise ModelFileError(
            f"{path} holds an absolute norm value; first turn the file's into differences: tools/convert_adapter.py "
            "with --base_model"
        )
    if adapter_kind(path, suffixes) == "loha" and not as_lora:
        raise SettingError(f"{path} is LoHa, which has no best LoHa of a lower rank; make it LoRA with --type lora")


def _as_stored(resized: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New factors in the widest number format of the old ones; alpha and what is unchanged as they are."""
    factors = [tensor.dtype for suffix, tensor in own.items() if suffix not in ("alpha", "dora_scale")]
    widest = max(factors, key=lambda dtype: dtype.itemsize)
    return {
        suffix: tensor if suffix == "alpha" or tensor is own.get(suffix) else tensor.to(widest)
        for suffix, tensor in resized.items()
    }


def _new_metadata(metadata: Mapping[str, str], resized: Adapters, arguments: argparse.Namespace) -> dict[str, str]:
    """The old metadata with type, rank and alpha as they now are, and what was done; its training stays told."""
    done = {"input": arguments.input.name, "type": arguments.type, "rank": arguments.rank, "energy": arguments.energy}
    new = rank_metadata(resized)
    if arguments.type == "lora":
        new |= {"ss_network_module": "networks.lora_anima", "ss_network_args": "{}"}
    told = {key: value for key, value in new.items() if key in metadata}
    return {**metadata, **told, "ss_anima_resized": json.dumps(done)}


if __name__ == "__main__":
    sys.exit(main())
