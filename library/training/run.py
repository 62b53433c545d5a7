"""How long a run is, in which precision, from where it starts, and how far it has come."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from library.errors import SettingError
from library.options import option

# What `resume` says for the newest state.
LATEST = Path("latest")

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunSettings:
    """Length, precision and seed of the run."""

    max_train_steps: int = option(1600, "Optimizer steps to train; --dry_run tells how many make an epoch.")
    max_train_epochs: int | None = option(None, "Epochs to train; wins over max_train_steps.", zero_is_unset=True)
    gradient_accumulation_steps: int = option(
        1, "Batches that make one optimizer step: 4 train like a batch of four times the size, in the memory of one."
    )
    gradient_checkpointing: bool | None = option(
        None,
        "Compute each block again in the backward pass: least memory, a quarter more time. Unset: on for CUDA cards "
        "whose memory would not suffice without.",
    )
    selective_checkpointing: bool | None = option(
        None,
        "Without gradient_checkpointing and with fused_blocks, compute again what takes little time, norms and "
        "activations: about half of the memory that the backward pass needs, a twentieth more time. Unset: on for CUDA "
        "cards whose memory would not suffice without.",
    )
    cpu_offload_checkpointing: bool | None = option(
        None,
        "With gradient_checkpointing and fused_blocks, what is kept of the forward pass waits in main memory, 1.4 GB "
        "for a 1024² picture, copied while the card computes: less of the card's memory, and less to recompute. Unset: "
        "on for CUDA cards where it takes no more than half of the main memory that is free.",
    )
    mixed_precision: str = option(
        "no",
        "Number format the frozen model runs in; no is fp32. bf16 for RTX 30 and newer, fp16 for older cards. The "
        "adapter is trained in fp32 whatever this is.",
        choices=tuple(DTYPES),
    )
    full_bf16: bool = option(False, "Same as mixed_precision = bf16 here: the adapter's own weights stay fp32.")
    full_fp16: bool = option(False, "Same as mixed_precision = fp16 here: the adapter's own weights stay fp32.")
    seed: int = option(42, "Everything random in the run follows from it, so the same seed gives the same run.")
    resume: Path | None = option(
        None,
        "State folder of an earlier run to continue exactly. latest: the newest complete one of this output_name in "
        "output_dir; where there is none yet, the run begins.",
    )
    resume_ignore_optimizer_mismatch: bool = option(
        True,
        "resume with another optimizer or optimizer_args: keep the weights and start the optimizer anew. Off: stop.",
    )
    anima_resume_snapshot_strict: bool = option(
        False,
        "resume with other data, another base model or another objective: stop. Off: warn and go on. Another network "
        "always stops; another learning rate, schedule or length never does.",
    )
    initial_step: int = option(
        0,
        "Steps that count as done at the start: numbers in file names and the end of the run follow from it. To go on "
        "from an adapter without a state; the learning rate schedule still begins at its start.",
    )
    initial_epoch: int = option(
        1, "The same in epochs: 3 starts with the third. initial_step wins.", zero_is_unset=True
    )
    skip_until_initial_step: bool = option(
        False,
        "With initial_step, leave out the pictures that its epoch has already shown. Off: the epoch starts anew.",
    )
    dry_run: bool = option(
        False, "Check everything that can be checked without loading a model, say what the run would be, and stop."
    )
    preflight: bool = option(
        False,
        "Try the run first: a real step of each bucket at its largest batch, then a table of time and memory, and what "
        "to change where it does not fit the card. Nothing is trained or saved but caches.",
    )

    @property
    def precision(self) -> str:
        """What the frozen model runs in: a key of DTYPES."""
        return "bf16" if self.full_bf16 else "fp16" if self.full_fp16 else self.mixed_precision


@dataclass
class RunState:
    """All that changes as a run goes on, apart from weights and optimizer; saved as readable JSON.

    step: optimizer steps done. epoch: the epoch now running, from 0. step_in_epoch: steps of it already done.
    averages: what has been averaged so far, see `LossAverages`. saved_at: when that was, in seconds since 1970.
    skipped_steps, skipped_in_a_row: optimizer steps left out because a number was not finite, as of the last log point.
    rollbacks: how often weights went back to an earlier step for it. rate_factor: what they made of the rates.
    best_validation_loss, best_step: the least validation loss so far, and after how many steps it was measured.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    averages: dict[str, float] = field(default_factory=dict)
    saved_at: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    rate_factor: float = 1.0
    best_validation_loss: float | None = None
    best_step: int | None = None

    def is_best(self, validation_loss: float) -> bool:
        """Takes in the validation loss after `step` steps; whether none was less before. Untrained, nothing is best."""
        if self.step == 0 or not math.isfinite(validation_loss):
            return False
        if self.best_validation_loss is not None and validation_loss >= self.best_validation_loss:
            return False
        self.best_validation_loss, self.best_step = validation_loss, self.step
        return True

    def count(self, is_finite: bool, leaves_out: bool) -> None:
        """Counts a step whose numbers are known. leaves_out: whether one of other numbers was left out."""
        if is_finite:
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += leaves_out
            self.skipped_in_a_row += 1

    def advance(self, steps_per_epoch: int) -> bool:
        """Counts one optimizer step; True when it was the last of its epoch."""
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch < steps_per_epoch:
            return False
        self.epoch += 1
        self.step_in_epoch = 0
        return True

    def as_dict(self) -> dict[str, Any]:
        """What run_state.json holds."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, path: Path) -> RunState:
        """Reads run_state.json."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def starting_state(settings: RunSettings, steps_per_epoch: int) -> RunState:
    """Where a run without a state to resume begins: at initial_step or initial_epoch.

    Raises SettingError where the run ends before that.
    """
    step = settings.initial_step or (settings.initial_epoch - 1) * steps_per_epoch
    total = planned_steps(settings, steps_per_epoch)
    if step >= total:
        name = "initial_step" if settings.initial_step else "initial_epoch"
        raise SettingError(
            f"{name}: the run would start at step {step}, and ends at step {total}: lower it, or raise "
            "max_train_steps or max_train_epochs, which count from the very beginning"
        )
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    return RunState(step, epoch, step_in_epoch if settings.skip_until_initial_step else 0)


def planned_steps(settings: RunSettings, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    if settings.max_train_epochs is not None:
        return settings.max_train_epochs * steps_per_epoch
    return settings.max_train_steps
