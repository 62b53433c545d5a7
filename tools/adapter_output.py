"""What the tools that write adapter files share: where to, in which format, and that nothing is overwritten unasked."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from library.errors import SettingError
from library.files import write_atomically
from library.training.model_hashes import BLANK_HASHES, fill_hashes
from networks.adapter_files import save_adapter_file
from networks.adapter_types import Adapters
from networks.key_formats import FORMATS

PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_output_arguments(
    parser: argparse.ArgumentParser, default_format: str | None = "comfy", default_precision: str | None = None
) -> None:
    """--output, --format (required where there is no default), --precision and --overwrite."""
    parser.add_argument("--output", type=Path, required=True, help="file to write (.safetensors)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=default_format is None,
        default=default_format,
        help="whose spelling to write" + (f" (default {default_format})" if default_format else ""),
    )
    parser.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default=default_precision,
        help="number format " + (f"(default {default_precision})" if default_precision else "(unset: each tensor's)"),
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")


def check_output(arguments: argparse.Namespace) -> None:
    """Raises SettingError where the output file exists and may not be replaced."""
    if arguments.output.exists() and not arguments.overwrite:
        raise SettingError(f"--output: {arguments.output} exists; choose another name or add --overwrite")


def write_adapter(arguments: argparse.Namespace, adapters: Adapters, metadata: Mapping[str, str]) -> None:
    """Writes the adapter as the arguments say; hashes that the metadata has become those of the new file."""
    metadata = {key: BLANK_HASHES.get(key, value) for key, value in metadata.items()}
    dtype = PRECISIONS.get(arguments.precision)

    def write(file: Path) -> None:
        save_adapter_file(file, adapters, arguments.format, dtype, metadata)
        fill_hashes(file)

    write_atomically(arguments.output, write)
