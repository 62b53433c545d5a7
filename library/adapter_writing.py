"""Writing an adapter file, and proving that what was written can be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from library.errors import first_ten
from library.files import write_atomically
from library.model_hashes import fill_hashes
from library.tensor_files import spec_of, write_tensors


def write_adapter(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Writes a safetensors file with the hashes of its own bytes in its metadata, and reads it back.

    OSError where what is read differs from what was written; whatever was at `path` is then still there.
    """

    def write(file: Path) -> None:
        # Not by safetensors' own writers: one's error of a full disk has no error number, and the other makes all bytes
        # in one go, for which the run would wait.
        write_tensors(file, {name: spec_of(tensor) for name, tensor in tensors.items()}, tensors.__getitem__, metadata)
        fill_hashes(file)
        _check_reads_back(file, path.name, tensors)

    write_atomically(path, write)


def _check_reads_back(file: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    try:
        read = load_file(file)
    except SafetensorError as error:
        raise OSError(f"{name} cannot be read after writing ({error}): the disk may be failing") from error
    wrong = [key for key in tensors.keys() | read.keys() if key not in read or not _same(tensors.get(key), read[key])]
    if wrong:
        raise OSError(
            f"{name} reads back other than it was written ({first_ten(sorted(wrong))}): the disk may be failing"
        )


def _same(written: Tensor | None, read: Tensor) -> bool:
    """Byte for byte, as numbers that are not a number differ from themselves."""
    if written is None or (written.dtype, written.shape) != (read.dtype, read.shape):
        return False
    return torch.equal(written.reshape(-1).view(torch.uint8), read.reshape(-1).view(torch.uint8))
