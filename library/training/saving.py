"""Where and when a run saves, and what the files are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options import option


@dataclass(frozen=True)
class SavingSettings:
    """Adapter files and training states."""

    output_dir: Path = option(Path("output"), "Folder for adapter files, states and sample pictures.")
    output_name: str = option("anima_lora", "Name of the adapter file, without ending.")
    save_precision: str = option("float", "Number format of the saved adapter.", choices=("float", "fp16", "bf16"))
    save_every_n_epochs: int | None = option(None, "Save the adapter every so many epochs.")
    save_every_n_steps: int | None = option(None, "Save the adapter every so many optimizer steps.")
    save_state: bool = option(False, "Write a state to resume from at every save, and at the end.")
    save_state_on_train_end: bool = option(False, "Write a state to resume from at the end only.")
    training_comment: str | None = option(None, "A note kept in the adapter's metadata.")
    no_metadata: bool = option(False, "Leave the metadata out of the adapter file.")
