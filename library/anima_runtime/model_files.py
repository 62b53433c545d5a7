"""Reading model files strictly: every tensor has its place and shape, or the file is refused with the names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from library.anima_runtime.file_kinds import describe_tensors
from library.anima_runtime.memory.quantised import StoredTensor, apply_scale, fold_scales
from library.errors import ModelFileError, first_ten

Rename = Callable[[str], str | None]

# A file's pages stay in memory while it is open, so it is opened again for every 32 MiB of tensors.
_BYTES_PER_OPENING = 32 * 2**20


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Names, shapes and types of a safetensors file's tensors, without loading them.

    Raises ModelFileError where the file is missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise ModelFileError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; a .safetensors file is needed.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} is not a whole .safetensors file: {error}") from error


def match_tensors(path: Path, module: nn.Module, rename: Rename, what: str) -> dict[str, StoredTensor]:
    """Finds the file's tensor for every name and shape of the module's state dict, from the file's header alone.

    rename: the module's name for a name in the file, or None for a tensor that is to be left out.
    what: what the file was given as, for the message: "an Anima transformer".
    Raises ModelFileError listing missing, unknown and mis-shaped tensors, and what the file looks like.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    header = read_header(path)
    matched: dict[str, StoredTensor] = {}
    unknown = []
    for name, tensor in fold_scales(path, header).items():
        target = rename(name)
        if target in expected and target not in matched:
            matched[target] = tensor
        elif target is not None:
            unknown.append(name)
    missing = [name for name in expected if name not in matched]
    misshaped = [
        f"{tensor.name} {list(tensor.shape)} instead of {list(expected[name])}"
        for name, tensor in matched.items()
        if tensor.shape != expected[name]
    ]
    misfits = list_misfits(missing, unknown, misshaped)
    if misfits:
        raise ModelFileError(f"{path} was given as {what}, and looks like {describe_tensors(header)}.{misfits}")
    return matched


def list_misfits(missing: Sequence[str], unknown: Sequence[str], misshaped: Sequence[str]) -> str:
    """What of a file does not fit, each kind on a line of its own; "" where all does."""
    kinds = {"missing tensors": missing, "unknown tensors": unknown, "tensors of another shape": misshaped}
    return "".join(f"\n  {len(names)} {kind}: {first_ten(names)}" for kind, names in kinds.items() if names)


def load_into(
    module: nn.Module, path: Path, rename: Rename, dtype: torch.dtype, device: torch.device | str, what: str
) -> None:
    """Fills a module built on the meta device from a safetensors file, strictly, tensor by tensor.

    Afterwards the module's parameters and persistent buffers lie on `device` in `dtype`, none requires a gradient, and
    the module is in eval mode. Buffers that are not in its state dict are left as they are. 8-bit weights are decoded.
    rename, what: see match_tensors, whose errors this raises before anything is loaded.
    """
    matched = match_tensors(path, module, rename, what)
    state = dict(_read_tensors(path, matched, dtype, torch.device(device)))
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False).eval()


def _read_tensors(
    path: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    waiting = list(tensors.items())[::-1]
    while waiting:
        read = 0
        with safe_open(path, framework="pt") as file:
            while waiting and read < _BYTES_PER_OPENING:
                name, stored = waiting.pop()
                values = file.get_tensor(stored.name)
                read += values.nbytes
                if stored.scale is not None:
                    values = apply_scale(values, file.get_tensor(stored.scale))
                # A copy even where nothing changes: the tensor read is a view of the open file.
                yield name, torch.empty(values.shape, dtype=dtype, device=device).copy_(values)
