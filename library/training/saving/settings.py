"""Where and when a run saves, and what the files are called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from library.options import option

SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of one trained number in a state: itself, and the two moments that AdamW keeps, which is as much as optimizers need.
_STATE_BYTES = 12


@dataclass(frozen=True)
class SavingSettings:
    """Adapter files and training states."""

    output_dir: Path = option(Path("output"), "Folder for adapter files, states and sample pictures.")
    output_name: str = option("anima_lora", "Name of the adapter file, without ending.")
    save_precision: str = option(
        "float",
        "Number format of the saved adapter: fp16 and bf16 halve its file, and fp16 keeps more digits.",
        choices=tuple(SAVE_DTYPES),
    )
    save_every_n_epochs: int | None = option(None, "Save the adapter every so many epochs.", zero_is_unset=True)
    save_every_n_steps: int | None = option(None, "Save the adapter every so many optimizer steps.", zero_is_unset=True)
    save_n_epoch_ratio: int | None = option(
        None, "Save so many times, evenly over the epochs; wins over save_every_n_epochs.", zero_is_unset=True
    )
    save_last_n_epochs: int | None = option(
        None, "Keep only so many of the adapters saved by epochs: the latest. Unset: all.", zero_is_unset=True
    )
    save_last_n_steps: int | None = option(
        None,
        "Keep only the adapters saved by steps that are at most so many steps older than the latest. Unset: all.",
        zero_is_unset=True,
    )
    save_last_n_epochs_state: int | None = option(
        None, "The same as save_last_n_epochs for states. Unset: as many as of the adapters.", zero_is_unset=True
    )
    save_last_n_steps_state: int | None = option(
        None, "The same as save_last_n_steps for states. Unset: as for the adapters.", zero_is_unset=True
    )
    overwrite_output: bool = option(
        False,
        "Begin although output_dir holds files of an earlier run with this output_name, and write over those of the "
        "same names. Off: the run does not start.",
    )
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


@dataclass(frozen=True)
class PlannedFiles:
    """What of a whole run lies in output_dir at once, at most: numbers of adapters and states, and the bytes of one."""

    adapters: int
    adapter_bytes: int
    states: int
    state_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them together."""
        return self.adapters * self.adapter_bytes + self.states * self.state_bytes


NO_FILES = PlannedFiles(0, 0, 0, 0)


def planned_files(
    settings: SavingSettings,
    formats: int,
    parameters: int,
    total_steps: int,
    steps_per_epoch: int,
    saves_best: bool = False,
) -> PlannedFiles:
    """The files of a run; formats: files of each saved adapter; parameters: numbers that are trained.

    saves_best: whether the adapter with the least validation loss is kept beside the others.
    """
    adapters, states = 1 + saves_best, (1 + saves_best) * settings.save_state
    if not settings.save_state and settings.save_state_on_train_end:
        states = 1
    epochs = save_epochs(settings, total_steps, steps_per_epoch)
    for unit, every in (("step", settings.save_every_n_steps), ("epoch", epochs)):
        if every is None:
            continue
        saves = (total_steps - 1) // (every if unit == "step" else every * steps_per_epoch)
        kept, kept_states = kept_saves(settings, unit)
        adapters += _at_once(saves, kept, every, unit)
        states += settings.save_state * _at_once(saves, kept_states, every, unit)
    return PlannedFiles(
        adapters=adapters * formats,
        adapter_bytes=parameters * SAVE_DTYPES[settings.save_precision].itemsize,
        states=states,
        state_bytes=parameters * _STATE_BYTES,
    )


def kept_saves(settings: SavingSettings, unit: str) -> tuple[int | None, int | None]:
    """save_last_n_… of adapters and of states, for "epoch" or "step": a number of saves or of steps; None for all."""
    kept = getattr(settings, f"save_last_n_{unit}s")
    kept_states = getattr(settings, f"save_last_n_{unit}s_state")
    return kept, kept if kept_states is None else kept_states


def _at_once(saves: int, kept: int | None, every: int, unit: str) -> int:
    """How many of the saves lie there at most: those that are kept, and a new one before the oldest goes."""
    if kept is None:
        return saves
    return min(saves, (kept if unit == "epoch" else kept // every + 1) + 1)


def save_epochs(settings: SavingSettings, total_steps: int, steps_per_epoch: int) -> int | None:
    """Epochs from one save to the next; None for no saves by epochs."""
    if settings.save_n_epoch_ratio is None:
        return settings.save_every_n_epochs
    return max(-(-total_steps // steps_per_epoch) // settings.save_n_epoch_ratio, 1)


def epoch_name(output_name: str, epochs_done: int) -> str:
    """my_lora-000002: after the second epoch."""
    return f"{output_name}-{epochs_done:06d}"


def step_name(output_name: str, steps_done: int) -> str:
    """my_lora-step00000100: after the hundredth step."""
    return f"{output_name}-step{steps_done:08d}"


def is_due(every: int | None, count: int) -> bool:
    """Whether something done every so many steps or epochs is due after `count` of them."""
    return every is not None and count % every == 0


# What stands behind a save's name in those of its further files.
_KINDS = ("best", "ema", "comfy", "kohya", "diffusers")


def saved_name(output_name: str) -> re.Pattern[str]:
    """Matches the whole name of every adapter file and state folder of runs with that output_name.

    Groups: epoch and step, of saves along the way, and ending: ".safetensors" or "-state".
    """
    number = r"(?:-(?P<epoch>\d{6})|-step(?P<step>\d{8}))?"
    kinds = rf"(?:-(?:{'|'.join(_KINDS)}))*"
    return re.compile(rf"{re.escape(output_name)}{number}{kinds}(?P<ending>\.safetensors|-state)")
