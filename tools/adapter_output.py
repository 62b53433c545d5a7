"""What the tools that write adapter files share: where to, in which format, and that nothing is overwritten unasked."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from library.errors import SettingError
from library.files import write_atomically
from library.model_hashes import BLANK_HASHES, fill_hashes
from library.tensor_files import TensorSpool, write_tensors
from library.training.saving.settings import SAVE_DTYPES
from networks.adapter_files import export_tensors
from networks.adapter_types import Adapters
from networks.key_formats import FORMATS


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
        choices=tuple(SAVE_DTYPES),
        default=default_precision,
        help="number format " + (f"(default {default_precision})" if default_precision else "(unset: each tensor's)"),
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")


def check_output(arguments: argparse.Namespace) -> None:
    """Raises SettingError where the output file exists and may not be replaced."""
    if arguments.output.exists() and not arguments.overwrite:
        raise SettingError(f"--output: {arguments.output} exists; choose another name or add --overwrite")


class AdapterWriter:
    """Writes an adapter module by module, so that memory holds one of them; they wait in a file beside the output.

    outline: the adapter so far, with tensors on the meta device that hold shapes and number formats only, but alphas.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        """arguments: those of `add_output_arguments`."""
        self.outline: Adapters = {}
        self._arguments = arguments
        self._spool = TensorSpool(arguments.output.parent)

    def add(self, module: str, own: Mapping[str, Tensor]) -> None:
        """One module's tensors by suffix; see `networks.adapter_files.export_tensors` for the errors."""
        dtype = SAVE_DTYPES.get(self._arguments.precision)
        for key, tensor in export_tensors({module: own}, self._arguments.format, dtype).items():
            self._spool.add(key, tensor)
        self.outline[module] = {
            suffix: tensor.detach() if suffix == "alpha" else tensor.to("meta") for suffix, tensor in own.items()
        }

    def write(self, metadata: Mapping[str, str]) -> None:
        """Writes the file; hashes that the metadata has become those of the new file."""
        metadata = {key: BLANK_HASHES.get(key, value) for key, value in metadata.items()}

        def write(file: Path) -> None:
            write_tensors(file, self._spool.specs, self._spool.read, metadata)
            fill_hashes(file)

        write_atomically(self._arguments.output, write)

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()


def write_adapter(arguments: argparse.Namespace, adapters: Adapters, metadata: Mapping[str, str]) -> None:
    """Writes an adapter that is in memory already; see `AdapterWriter`."""
    with AdapterWriter(arguments) as writer:
        for module, own in adapters.items():
            writer.add(module, own)
        writer.write(metadata)
