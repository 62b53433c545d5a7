"""Where and when a run saves, and what the files are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from library.options import option

SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SavingSettings:
    """Adapter files and training states."""

    output_dir: Path = option(Path("output"), "Folder for adapter files, states and sample pictures.")
    output_name: str = option("anima_lora", "Name of the adapter file, without ending.")
    save_precision: str = option("float", "Number format of the saved adapter.", choices=tuple(SAVE_DTYPES))
    save_every_n_epochs: int | None = option(None, "Save the adapter every so many epochs.")
    save_every_n_steps: int | None = option(None, "Save the adapter every so many optimizer steps.")
    save_state: bool = option(False, "Write a state to resume from at every save, and at the end.")
    save_state_on_train_end: bool = option(False, "Write a state to resume from at the end.")
    training_comment: str | None = option(None, "A note kept in the adapter's metadata.")
    metadata_title: str | None = option(None, "The adapter's title in its metadata. Unset: output_name.")
    metadata_author: str | None = option(None, "Who made the adapter, for its metadata.")
    metadata_description: str | None = option(None, "What the adapter does, for its metadata.")
    metadata_license: str | None = option(None, "The adapter's licence, for its metadata.")
    metadata_tags: str | None = option(None, "Tags to find the adapter by, separated by commas, for its metadata.")
    metadata_trigger_phrase: str | None = option(None, "Words that bring out what was learnt, for the metadata.")
    metadata_usage_hint: str | None = option(None, "How to use the adapter, for its metadata.")
    no_metadata: bool = option(False, "Leave the metadata out of the adapter file.")


def epoch_name(output_name: str, epochs_done: int) -> str:
    """my_lora-000002: after the second epoch."""
    return f"{output_name}-{epochs_done:06d}"


def step_name(output_name: str, steps_done: int) -> str:
    """my_lora-step00000100: after the hundredth step."""
    return f"{output_name}-step{steps_done:08d}"


def is_due(every: int | None, count: int) -> bool:
    """Whether something done every so many steps or epochs is due after `count` of them."""
    return every is not None and count % every == 0
