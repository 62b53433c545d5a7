"""Extracts an adapter from the difference of two Anima checkpoints: a base, and one tuned or merged from it.

    python tools/extract_adapter.py --base BASE.safetensors --tuned TUNED.safetensors --output OUT.safetensors
        --type lora (--rank N | --energy 0.95)  |  --type lokr [--factor 8]
        [--format comfy|kohya|diffusers] [--precision float|fp16|bf16] [--device cpu|cuda]

LoRA: the best approximation of the rank for every Linear that differs. LoKr: the nearest Kronecker product of whole
matrices, which tools/resize_adapter.py makes smaller. Differences of norms go into the file as they are (not for
diffusers, which has no name for them); those of biases and of the T5 embedding cannot, and are listed. The checkpoints
may differ in number format and prefix. Memory holds one pair of tensors at a time. LoRA takes a CPU of two cores some 2
seconds for a Linear of 2048 x 2048.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors import safe_open
from torch import Tensor

from library.anima_runtime.checkpoint import check_transformer_file, strip_prefix
from library.anima_runtime.memory.quantised import StoredTensor, apply_scale, fold_scales
from library.anima_runtime.model_files import read_header
from library.console import progress_bar, show, show_error
from library.errors import ModelFileError, SettingError, UserError, first_ten
from library.model_hashes import BLANK_HASHES
from networks.adapter_types import Adapters, describe_adapters
from networks.approximation import Approximation, nearest_lokr, nearest_lora
from tools.adapter_output import AdapterWriter, add_output_arguments, check_output
from tools.approximations import add_limit_arguments, limits_of, rank_metadata, show_approximations

DEFAULT_FACTOR = 8
EMBEDDING = "llm_adapter.embed"

Maker = Callable[[Tensor], Approximation]


@dataclass(frozen=True)
class Extracted:
    """approximations: of the matrices, by module path, without their tensors.

    left_out: names of tensors that differ and have no place.
    """

    approximations: dict[str, Approximation]
    left_out: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after an error was shown."""
    arguments = _parse(argv)
    try:
        extract_file(arguments)
    except UserError as error:
        show_error(error)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Extract an adapter from the difference of two Anima checkpoints.")
    parser.add_argument("--base", type=Path, required=True, help="transformer file the adapter will be used with")
    parser.add_argument("--tuned", type=Path, required=True, help="transformer file it shall come near to")
    parser.add_argument("--type", choices=("lora", "lokr"), required=True)
    add_limit_arguments(parser)
    parser.add_argument("--factor", type=int, help="of LoKr (default 8; -1: the most balanced)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to compute; unset: the GPU if there is one, else the CPU"
    )
    add_output_arguments(parser, default_precision="float")
    return parser.parse_args(argv)


def extract_file(arguments: argparse.Namespace) -> None:
    """Reads, extracts, writes and reports. Raises UserError before anything is written."""
    make, device = _maker(arguments), _device(arguments.device)
    check_output(arguments)
    depth = _common_depth(arguments.base, arguments.tuned)
    with AdapterWriter(arguments) as writer:
        extracted = extract(arguments.base, arguments.tuned, make, device, writer, arguments.format != "diffusers")
        if not writer.outline:
            raise ModelFileError(
                f"{arguments.base} and {arguments.tuned} differ in nothing that an adapter can hold"
                + (f", only in {first_ten(extracted.left_out)}" if extracted.left_out else "")
            )
        writer.write(_metadata(arguments, writer.outline, depth))
    show_approximations(extracted.approximations)
    if extracted.left_out:
        show(f"left out, as the file cannot hold them: {first_ten(extracted.left_out)}")
    show(f"{arguments.output}: {describe_adapters(writer.outline)}")


def _maker(arguments: argparse.Namespace) -> Maker:
    """What makes the adapter of one matrix's difference; SettingError for arguments that go not together."""
    if arguments.type == "lora":
        if arguments.factor is not None:
            raise SettingError("--factor belongs to --type lokr")
        return partial(nearest_lora, limits=limits_of(arguments))
    if arguments.rank is not None or arguments.energy is not None:
        raise SettingError(
            "--type lokr is extracted with whole matrices, without --rank and --energy; tools/resize_adapter.py makes "
            "the file smaller"
        )
    if arguments.format == "diffusers":
        raise SettingError("--format diffusers holds LoRA only: choose --type lora, or the format comfy or kohya")
    factor = DEFAULT_FACTOR if arguments.factor is None else arguments.factor
    if factor < 1 and factor != -1:
        raise SettingError(f"--factor {factor}: a factor is 1 or more, or -1 for the most balanced")
    return partial(nearest_lokr, factor=factor)


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingError("--device cuda: torch finds no GPU; leave --device out to compute on the CPU")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _common_depth(base: Path, tuned: Path) -> int:
    """Raises ModelFileError where a file is no whole Anima, or the two are of different sizes."""
    sizes, tuned_sizes = asdict(check_transformer_file(base)), asdict(check_transformer_file(tuned))
    differences = [
        f"{name} {size} and {tuned_sizes[name]}" for name, size in sizes.items() if size != tuned_sizes[name]
    ]
    if differences:
        raise ModelFileError(f"{base} and {tuned} are Animas of different sizes: {', '.join(differences)}")
    return sizes["depth"]


def extract(
    base: Path, tuned: Path, make: Maker, device: torch.device, writer: AdapterWriter, with_norms: bool
) -> Extracted:
    """Compares two checkpoints of the same sizes tensor by tensor; what does not differ gets no adapter.

    make: the adapter of one matrix's difference [out, in]. with_norms: whether the file can hold those of norms.
    Raises ModelFileError for values that are not finite.
    """
    base_weights, tuned_weights = _stored_weights(base), _stored_weights(tuned)
    approximations, left_out = {}, []
    with progress_bar(len(base_weights), "comparing tensors") as bar:
        for name, stored in base_weights.items():
            delta = _read(tuned, tuned_weights[name], device).sub_(_read(base, stored, device))
            path, _, parameter = name.rpartition(".")
            if not delta.isfinite().all():
                raise ModelFileError(f"{name} is not finite in {base} or {tuned}")
            if not delta.any():
                pass
            elif parameter == "weight" and delta.ndim == 2 and path != EMBEDDING:
                found = make(delta)
                writer.add(path, found.tensors)
                approximations[path] = replace(found, tensors={})
            elif parameter == "weight" and delta.ndim == 1 and with_norms:
                writer.add(path, {"w_norm": delta})
            else:
                left_out.append(name)
            del delta  # before the next pair is read
            bar.update()
    return Extracted(approximations, left_out)


def _stored_weights(path: Path) -> dict[str, StoredTensor]:
    """The file's tensors by the model's own names."""
    header = read_header(path)
    rename = strip_prefix(header)
    return {bare: tensor for name, tensor in fold_scales(path, header).items() if (bare := rename(name)) is not None}


def _read(path: Path, stored: StoredTensor, device: torch.device) -> Tensor:
    """In float32. The file is opened for each tensor, as its pages stay in memory while it is open."""
    with safe_open(path, framework="pt") as file:
        values = file.get_tensor(stored.name).to(device, torch.float32, copy=True)
        return values if stored.scale is None else apply_scale(values, file.get_tensor(stored.scale).to(device))


def _metadata(arguments: argparse.Namespace, adapters: Adapters, depth: int) -> dict[str, str]:
    made = {"base": arguments.base.name, "tuned": arguments.tuned.name, "type": arguments.type}
    if arguments.type == "lora":
        made |= {"rank": arguments.rank, "energy": arguments.energy}
    return {
        "ss_base_model_version": "anima",
        "ss_anima_depth": str(depth),
        "ss_network_module": f"networks.{arguments.type}_anima",
        **rank_metadata(adapters),
        "ss_anima_extracted": json.dumps(made),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "anima/lora",
        "modelspec.title": arguments.output.stem,
        **BLANK_HASHES,
    }


if __name__ == "__main__":
    sys.exit(main())
