"""Writing a safetensors file tensor by tensor, so that memory holds one of them at a time.

safetensors' own writers take all tensors at once. The format: eight bytes with the header's length (little-endian),
the header as JSON ({name: {dtype, shape, data_offsets}}, and texts under "__metadata__"), then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import ModelFileError, first_ten

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What the header says of a tensor before its values are there. dtype: as safetensors spells it ("BF16")."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def spec_of(tensor: Tensor) -> TensorSpec:
    """A tensor's own. A dtype that safetensors does not know is spelt as torch does."""
    return TensorSpec(tuple(tensor.shape), _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)))


def write_tensors(
    file: Path,
    specs: Mapping[str, TensorSpec],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file, asking for one tensor after the other.

    tensor_of: gives a tensor by name, with the shape and dtype of its spec. Not atomic by itself: see
    `library.files.write_atomically`. Raises ModelFileError for a tensor unlike its spec or of a type not known here.
    """
    try:
        pieces = tensor_pieces(specs, tensor_of, metadata)
        header = next(pieces)
        with file.open("wb") as opened:
            opened.write(header)
            opened.writelines(pieces)
    except ModelFileError as error:
        raise ModelFileError(f"{file}: {error}") from error


def tensor_pieces(
    specs: Mapping[str, TensorSpec],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[bytes | memoryview]:
    """A safetensors file's bytes, one tensor after the other; see `write_tensors`."""
    unknown = [f"{name} ({spec.dtype})" for name, spec in specs.items() if spec.dtype not in DTYPES]
    if unknown:
        raise ModelFileError(f"number formats that cannot be written: {first_ten(unknown)}")
    # Wide numbers first, so that every tensor lies at a multiple of its numbers' size, as safetensors writes them.
    ordered = sorted(specs, key=lambda name: -DTYPES[specs[name].dtype].itemsize)
    header = _header({name: specs[name] for name in ordered}, metadata)
    yield len(header).to_bytes(8, "little") + header
    for name in ordered:
        yield _bytes_of(name, tensor_of(name), specs[name])


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, spec in specs.items():
        end = start + spec.size
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return header + b" " * (-len(header) % 8)  # the tensors begin at a multiple of eight bytes


def _bytes_of(name: str, tensor: Tensor, spec: TensorSpec) -> memoryview:
    if tuple(tensor.shape) != spec.shape or _DTYPE_NAMES.get(tensor.dtype) != spec.dtype:
        raise ModelFileError(
            f"{name} is {list(tensor.shape)} of {tensor.dtype}, not {list(spec.shape)} of {spec.dtype}"
        )
    return _memory_of(tensor.cpu().contiguous())


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which it shares."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())


class TensorSpool:
    """Tensors that wait in a scratch file until all are there, as a file's header says first what follows.

    specs: of the tensors so far, by name. The scratch file has no name and goes with the spool, or with the process.
    """

    def __init__(self, folder: Path) -> None:
        """folder: where there is room for all tensors; it is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        self.specs: dict[str, TensorSpec] = {}
        self._starts: dict[str, int] = {}
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open until close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises ModelFileError for numbers of a type not known here."""
        spec = spec_of(tensor)
        self._starts[name] = self._file.tell()
        self._file.write(_bytes_of(name, tensor, spec))
        self.specs[name] = spec

    def read(self, name: str) -> Tensor:
        """A tensor that was added; none can be added afterwards."""
        spec = self.specs[name]
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        self._file.seek(self._starts[name])
        self._file.readinto(_memory_of(tensor))
        return tensor

    def close(self) -> None:
        """Gives the scratch file's room back."""
        self._file.close()
