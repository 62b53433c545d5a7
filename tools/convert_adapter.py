"""Converts an adapter file of any known spelling for ComfyUI, Kohya's scripts or diffusers; every change stays equal.

    python tools/convert_adapter.py --input IN.safetensors --output OUT.safetensors --format comfy|kohya|diffusers

LoRA, LoKr, LoHa, norms and text-encoder adapters go to comfy and kohya, LoRA on the transformer alone to diffusers.
Alphas of PEFT's files are taken from the header or from adapter_config.json beside the input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors import safe_open
from torch import Tensor

from library.anima_runtime.checkpoint import names_in_file
from library.anima_runtime.model_files import read_header
from library.console import show, show_error
from library.errors import ModelFileError, SettingError, UserError
from networks.adapter_files import open_adapter_file
from networks.adapter_types import NORM_VALUE, describe_adapters
from networks.key_formats import resolve_norm_values
from tools.adapter_output import AdapterWriter, add_output_arguments, check_output


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after an error was shown."""
    arguments = _parse(argv)
    try:
        convert(arguments)
    except UserError as error:
        show_error(error)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert an adapter file to another program's spelling.")
    parser.add_argument("--input", type=Path, required=True, help="adapter file (.safetensors)")
    add_output_arguments(parser, default_format=None)
    parser.add_argument("--base_model", type=Path, help="transformer file; only for files with absolute norm values")
    return parser.parse_args(argv)


def convert(arguments: argparse.Namespace) -> None:
    """Reads, renames and writes, module by module. Raises UserError before anything is written."""
    check_output(arguments)
    source = open_adapter_file(arguments.input)
    has_norm_values = any(NORM_VALUE in suffixes for suffixes in source.modules.values())
    if has_norm_values and arguments.base_model is None:
        raise SettingError(
            f"{arguments.input} holds absolute norm values; give the transformer they belong to with --base_model"
        )
    base_weight = _weight_reader(arguments.base_model) if has_norm_values else None
    with AdapterWriter(arguments) as writer:
        for module in source.modules:
            for path, own in resolve_norm_values({module: source.module(module)}, base_weight).items():
                writer.add(path, own)
        writer.write(source.own_metadata)
    show(f"{arguments.output}: {describe_adapters(writer.outline)}; {source.format} -> {arguments.format}")


def _weight_reader(path: Path) -> Callable[[str], Tensor]:
    """Reads single weights of a checkpoint, whatever prefix its names have."""
    names = names_in_file(read_header(path))

    def read(module: str) -> Tensor:
        name = names.get(f"{module}.weight")
        if name is None:
            raise ModelFileError(f"--base_model: {path} has no {module}.weight; give the transformer of the adapter")
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read


if __name__ == "__main__":
    sys.exit(main())
