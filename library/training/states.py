"""State folders: everything a run needs to go on exactly where it stopped.

A folder holds network.safetensors (the adapter in float32, internal names), optimizer.pt, schedule.pt, scaler.pt (fp16
runs), and run_state.json. It appears under its name only when complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import ModelFileError, SettingError, first_ten
from library.files import folder_written_atomically
from library.training.run import RunState

# What the readers of JSON, safetensors and torch files raise for missing, cut or foreign ones.
_DAMAGED = (OSError, ValueError, TypeError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


@dataclass(frozen=True)
class Resumable:
    """What a state folder saves and gives back."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler


def save_state(folder: Path, parts: Resumable, state: RunState) -> None:
    """Writes the state folder."""
    with folder_written_atomically(folder) as temporary:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in parts.network.state_dict().items()}
        save_file(tensors, temporary / "network.safetensors")
        torch.save(parts.optimizer.state_dict(), temporary / "optimizer.pt")
        torch.save(parts.schedule.state_dict(), temporary / "schedule.pt")
        torch.save(parts.scaler.state_dict(), temporary / "scaler.pt")
        state.save(temporary / "run_state.json")


def load_state(folder: Path, parts: Resumable) -> RunState:
    """Puts weights, optimizer and schedule back and returns the run state.

    Raises SettingError when the folder is no state or lacks what this run needs, ModelFileError when a file of it is
    damaged, or belongs to a network of other modules or shapes.
    """
    if not (folder / "run_state.json").is_file():
        raise SettingError(f"resume: {folder} is not a state folder (it has no run_state.json)")
    try:
        state = RunState.load(folder / "run_state.json")
        tensors = load_file(folder / "network.safetensors")
        optimizer, schedule, scaler = (_load(folder / f"{name}.pt") for name in ("optimizer", "schedule", "scaler"))
    except _DAMAGED as error:
        raise ModelFileError(f"resume: the state in {folder} is damaged: {error}; give an earlier one") from error
    own = {name: tuple(tensor.shape) for name, tensor in parts.network.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if own != theirs:
        different = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
        raise ModelFileError(
            f"resume: the state in {folder} is of another network; these tensors differ or are missing: "
            f"{first_ten(different)}. Use the network_dim, network_module and targets it was trained with."
        )
    parts.network.load_state_dict(tensors)
    parts.optimizer.load_state_dict(optimizer)
    parts.schedule.load_state_dict(schedule)
    # Only fp16 runs have a loss scale: a run that begins to use fp16 starts with the scaler's own first guess.
    if scaler:
        parts.scaler.load_state_dict(scaler)
    return state


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's long text advises to load the file unsafely
        raise ValueError(f"{path.name} cannot be read") from error
