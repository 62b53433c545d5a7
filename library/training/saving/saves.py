"""A save: copied to main memory between two steps, and written while training goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from library.adapter_writing import write_adapter
from library.training.host_copy import HostCopy, bytes_of
from library.training.machine import free_bytes
from library.training.optimization.ema import AdapterEma
from library.training.optimization.optimizers import averaged_weights
from library.training.saving.settings import SAVE_DTYPES, SavingSettings
from library.training.saving.states import StateCopy, write_state

# Tensors by module and by name within it.
Adapters = Mapping[str, Mapping[str, Tensor]]
# Of adapters, a file format and a number format: the tensors of the file by key.
Export = Callable[[Adapters, str, torch.dtype], Mapping[str, Tensor]]
# Of each trained number a save holds the adapter's own, the state's, and the two moments that most optimizers keep.
SAVED_COPIES = 4


class AdapterNetwork(Protocol):
    """What a save needs of a network."""

    def adapter_tensors(self) -> Adapters:
        """Its tensors as they now are."""


@dataclass(frozen=True)
class Save:
    """A save on its way to main memory, which training no longer changes. adapters: by the names of their files."""

    name: str
    adapters: Mapping[str, HostCopy]
    metadata: Mapping[str, str] | None
    state: StateCopy | None


def copy_adapters(
    name: str, network: AdapterNetwork, optimizer: torch.optim.Optimizer, ema: AdapterEma | None
) -> dict[str, HostCopy]:
    """The adapter as it is used, and, where there is one, its average, by the names of their files."""
    with averaged_weights(optimizer):
        adapters = {name: HostCopy(network.adapter_tensors())}
    if ema is not None:
        with ema.applied():
            adapters[f"{name}-ema"] = HostCopy(network.adapter_tensors())
    return adapters


def bytes_to_write(save: Save, formats: int, dtype: torch.dtype) -> int:
    """About as many as the save's files have; headers and metadata are small beside them."""
    copies = [copied.wait() for copied in save.adapters.values()]
    numbers = sum(tensor.numel() for adapters in copies for own in adapters.values() for tensor in own.values())
    state = 0 if save.state is None else bytes_of(save.state.tensors.wait())
    return numbers * dtype.itemsize * formats + state


def write_save(save: Save, settings: SavingSettings, formats: Sequence[str], export: Export) -> list[Path]:
    """Writes each adapter in each format, and the state's folder; returns all of them.

    The first format's file has the adapter's name, and those of others name the format. OSError where the disk does not
    take them; nothing is begun where it has too little room.
    """
    written, dtype = [], SAVE_DTYPES[settings.save_precision]
    needed, free = bytes_to_write(save, len(formats), dtype), free_bytes(settings.output_dir)
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed, {free} are free", str(settings.output_dir))
    for stem, adapters in save.adapters.items():
        for number, file_format in enumerate(formats):
            path = settings.output_dir / (f"{stem}-{file_format}.safetensors" if number else f"{stem}.safetensors")
            write_adapter(path, export(adapters.wait(), file_format, dtype), save.metadata)
            written.append(path)
    if save.state is not None:
        written.append(settings.output_dir / f"{save.name}-state")
        write_state(written[-1], save.state)
    return written
