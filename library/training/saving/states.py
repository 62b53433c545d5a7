"""State folders: everything a run needs to go on exactly where it stopped.

A folder holds network.safetensors (the adapter in float32, internal names), optimizer.pt, scaler.pt and a .pt file for
each other part; for people to read, schedule.json, run_state.json and resume_snapshot.json; and in manifest.json the
checksums of them all. It appears under its name only when complete.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from library.errors import ModelFileError, SettingError, first_ten
from library.files import folder_written_atomically
from library.tensor_files import spec_of, tensor_pieces
from library.training.host_copy import HostCopy
from library.training.optimization.optimizer_states import load_optimizer, optimizer_content
from library.training.optimization.schedule_states import load_schedule, schedule_content
from library.training.run import RunState
from library.training.saving.checked_files import HashingFile, damage_of, write_checked

logger = logging.getLogger(__name__)

# What the readers of JSON, safetensors and torch files raise for missing, cut or foreign ones.
_DAMAGED = (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


class Stateful(Protocol):
    """A part of a run that keeps something over its steps."""

    def state_dict(self) -> dict[str, Any]:
        """What it keeps: tensors, numbers and texts in dicts, lists and tuples."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Takes over what `state_dict` gave."""


@dataclass(frozen=True)
class Resumable:
    """What a state folder saves and gives back. others: further parts by the names of their files, without ending."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    others: Mapping[str, Stateful] = field(default_factory=dict)


@dataclass(frozen=True)
class StateCopy:
    """A state on its way to main memory, which training no longer changes.

    tensors: of the network, and of each .pt file. run_state: gives it, once its numbers have come.
    """

    tensors: HostCopy
    run_state: Callable[[], RunState]
    json_files: dict[str, Any]


def copy_state(
    parts: Resumable, run_state: Callable[[], RunState], snapshot: Mapping[str, Any] | None = None
) -> StateCopy:
    """The state as it now is. run_state: see `StateCopy`.

    snapshot: what resume_snapshot.json will hold, see `library.training.saving.snapshot`.
    """
    torch_parts = {
        "optimizer": optimizer_content(parts.optimizer, parts.network),
        "scaler": parts.scaler.state_dict(),
        **{name: part.state_dict() for name, part in parts.others.items()},
    }
    tensors = HostCopy({"network": parts.network.state_dict(), **torch_parts})
    json_files = {
        "schedule": schedule_content(parts.schedule),
        "resume_snapshot": copy.deepcopy(dict(snapshot or {})),
    }
    return StateCopy(tensors, run_state, json_files)


def write_state(folder: Path, state: StateCopy) -> None:
    """Writes the state folder and reads it back. OSError where the disk does not take it."""
    tensors = dict(state.tensors.wait())
    run_state = replace(state.run_state(), saved_at=time.time())
    json_files = {"run_state": run_state.as_dict(), **state.json_files}
    files = {
        "network.safetensors": partial(_write_tensors, tensors.pop("network")),
        **{f"{name}.pt": partial(_write_torch, content) for name, content in tensors.items()},
        **{f"{name}.json": partial(_write_json, content) for name, content in json_files.items()},
    }
    with folder_written_atomically(folder) as temporary:
        write_checked(temporary, files)


def load_state(folder: Path, parts: Resumable, ignore_optimizer_mismatch: bool = True) -> RunState:
    """Puts weights, optimizer and schedule back and returns the run state.

    The rates are the new run's, at the state's step of its schedule: see `load_schedule`. ignore_optimizer_mismatch: an
    optimizer of another type or with other arguments starts anew, with a warning, where it otherwise is refused.
    Raises SettingError when the folder is no state or lacks what this run needs, ModelFileError when a file of it is
    damaged, or belongs to a network of other modules or shapes.
    """
    _check_is_state(folder)
    if damage := damage_of(folder):
        raise _damaged(folder, damage)
    try:
        state = RunState.load(folder / "run_state.json")
        tensors = safetensors.torch.load_file(folder / "network.safetensors")
        optimizer, scaler = _load(folder / "optimizer.pt"), _load(folder / "scaler.pt")
        schedule = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
        others = {name: _load(file) for name in parts.others if (file := folder / f"{name}.pt").exists()}
    except _DAMAGED as error:
        raise _damaged(folder, error) from error
    check_shapes(folder, parts.network)
    parts.network.load_state_dict(tensors)
    try:
        load_optimizer(optimizer, parts.optimizer, parts.network, ignore_optimizer_mismatch)
        load_schedule(schedule, parts.schedule)
        # Only fp16 runs have a loss scale: a run that begins to use fp16 starts with the scaler's own first guess.
        if scaler:
            parts.scaler.load_state_dict(scaler)
        for name, content in others.items():
            parts.others[name].load_state_dict(content)
    except _DAMAGED as error:
        raise _damaged(folder, error) from error
    for name in parts.others.keys() - others.keys():
        logger.warning("resume: %s has no %s.pt: that part starts anew", folder, name)
    return state


def read_run_state(folder: Path) -> RunState:
    """How far the state has come. SettingError when the folder is no state, ModelFileError when that is damaged."""
    _check_is_state(folder)
    try:
        return RunState.load(folder / "run_state.json")
    except _DAMAGED as error:
        raise _damaged(folder, error) from error


def _check_is_state(folder: Path) -> None:
    if not (folder / "run_state.json").is_file():
        raise SettingError(f"resume: {folder} is not a state folder (…-state): it has no run_state.json")


def check_shapes(folder: Path, network: nn.Module) -> None:
    """ModelFileError where the state is of a network of other modules or shapes, before any weight is read."""
    try:
        with safetensors.safe_open(folder / "network.safetensors", "pt") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except _DAMAGED as error:
        raise _damaged(folder, error) from error
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if own != theirs:
        different = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
        raise ModelFileError(
            f"resume: the state in {folder} is of another network; these tensors differ or are missing: "
            f"{first_ten(different)}. Use the network_dim, network_module and targets it was trained with."
        )


def _damaged(folder: Path, reason: object) -> ModelFileError:
    return ModelFileError(f"resume: the state in {folder} is damaged: {reason}; give an earlier one")


def _write_tensors(tensors: Mapping[str, torch.Tensor], file: HashingFile) -> None:
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    for piece in tensor_pieces(specs, tensors.__getitem__):
        file.write(piece)


def _write_torch(content: Any, file: HashingFile) -> None:
    torch.save(_alone(content), file)


def _write_json(content: Any, file: HashingFile) -> None:
    file.write((json.dumps(content, indent=2) + "\n").encode("utf-8"))


def _alone(content: Any) -> Any:
    """The same with tensors that share no memory: torch.save writes all that a tensor's memory holds."""
    if isinstance(content, torch.Tensor):
        return content.clone()
    if isinstance(content, dict):
        return {key: _alone(item) for key, item in content.items()}
    return type(content)(map(_alone, content)) if isinstance(content, list | tuple) else content


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's long text advises to load the file unsafely
        raise ValueError(f"{path.name} cannot be read") from error
