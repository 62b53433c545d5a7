"""How long a run is, in which precision, from where it starts, and how far it has come."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from library.options import option

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Below this much memory a 1024² step without recompute (18.6 GB eager at batch 1) does not fit beside a desktop.
MEMORY_WITHOUT_CHECKPOINTING = 30 * 2**30


@dataclass(frozen=True)
class RunSettings:
    """Length, precision and seed of the run."""

    max_train_steps: int = option(1600, "Optimizer steps to train.")
    max_train_epochs: int | None = option(None, "Epochs to train; wins over max_train_steps.")
    gradient_accumulation_steps: int = option(1, "Batches that make one optimizer step.")
    gradient_checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass: less memory, more time. Unset: chosen by the card's memory."
    )
    mixed_precision: str = option("no", "Precision of the frozen model; no is fp32.", choices=tuple(DTYPES))
    seed: int = option(42, "Everything random in the run follows from it.")
    resume: Path | None = option(None, "State folder of an earlier run to continue exactly.")


def chooses_checkpointing(settings: RunSettings, device: torch.device) -> bool:
    """Whether to recompute activations: as set, else on a CUDA card with less than 30 GiB."""
    if settings.gradient_checkpointing is not None:
        return settings.gradient_checkpointing
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).total_memory < MEMORY_WITHOUT_CHECKPOINTING


@dataclass
class RunState:
    """All that changes as a run goes on, apart from weights and optimizer; saved as readable JSON.

    step: optimizer steps done. epoch: the epoch now running, from 0. step_in_epoch: steps of it already done.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0

    def advance(self, steps_per_epoch: int) -> bool:
        """Counts one optimizer step; True when it was the last of its epoch."""
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch < steps_per_epoch:
            return False
        self.epoch += 1
        self.step_in_epoch = 0
        return True

    def save(self, path: Path) -> None:
        """Writes the JSON file."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> RunState:
        """Reads what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def planned_steps(settings: RunSettings, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    if settings.max_train_epochs is not None:
        return settings.max_train_epochs * steps_per_epoch
    return settings.max_train_steps
