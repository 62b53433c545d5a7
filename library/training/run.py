"""How long a run is, in which precision, and from where it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options import option


@dataclass(frozen=True)
class RunSettings:
    """Length, precision and seed of the run."""

    max_train_steps: int = option(1600, "Optimizer steps to train.")
    max_train_epochs: int | None = option(None, "Epochs to train; wins over max_train_steps.")
    gradient_accumulation_steps: int = option(1, "Batches that make one optimizer step.")
    gradient_checkpointing: bool | None = option(
        None, "Recompute activations in the backward pass: less memory, more time. Unset: chosen by the card's memory."
    )
    mixed_precision: str = option("no", "Precision of the frozen model: no is fp32.", choices=("no", "fp16", "bf16"))
    seed: int = option(42, "Everything random in the run follows from it.")
    resume: Path | None = option(None, "State folder of an earlier run to continue exactly.")
