"""The single-file form with keys such as model.transformer_path, in terms of this trainer's settings.

`root_style_keys` says what each key becomes. A root-style file may also use any setting's own name, under any heading.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from library.errors import did_you_mean
from library.settings.entries import Entry
from library.settings.groups import by_spelling, top_level_options
from library.settings.kohya_only import FIXED, NO_EFFECT, REFUSED, is_off
from library.settings.root_style_arguments import argument_list, argument_target, betas
from library.settings.root_style_keys import (
    ADAMW_DEFAULTS,
    ADAMW_NAMES,
    ARGUMENT_LISTS,
    ARGUMENTS,
    COMPUTED,
    DEFAULT_SOURCE,
    DEFAULTS,
    LOKR_DEFAULTS,
    NETWORK_MODULES,
    OPTIMIZER_NAMES,
    PRODIGY_PREFIX,
    SAME_VALUE,
    SIGNS,
    WITHOUT_COUNTERPART,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mapped:
    """A root-style file in settings' names: what it says, the defaults that lie below it, and what became nothing.

    unmapped: known keys without a counterpart, each with the reason.
    """

    entries: tuple[Entry, ...]
    defaults: tuple[Entry, ...] = ()
    unmapped: tuple[tuple[Entry, str], ...] = ()


def is_root_style(entries: Sequence[Entry]) -> bool:
    """Whether a settings file is of this form, told by its keys."""
    return any(entry.label in SIGNS for entry in entries)


def map_root_style(entries: Sequence[Entry], problems: list[str]) -> Mapped:
    """Renames and computes; unknown keys are added to `problems`, known ones that become nothing are told apart."""
    known_names = {*by_spelling(top_level_options()), *FIXED, *REFUSED}
    choices = _Choices(_network_module(entries), _optimizer_type(entries), _saves_states(entries))
    overruled = _overruled(entries)
    reasons = {
        entry.label: overruled.get(entry.label) or _reason_unmapped(entry, choices, known_names) for entry in entries
    }
    written = {entry.label: entry for entry in entries if reasons[entry.label] is None}
    mapped = [*_length(written), *_schedule(written), *_precision(written), *_output_name(written), *_states(written)]
    mapped += [*_network(written, choices.module, problems), *_optimizer(written, choices.optimizer, problems)]
    for label, entry in written.items():
        if label in SAME_VALUE:
            mapped.append(replace(entry, name=SAME_VALUE[label]))
        elif label in COMPUTED or argument_target(label) is not None or entry.name in ARGUMENT_LISTS:
            continue
        elif entry.name in known_names:
            mapped.append(entry)
        else:
            problems.append(f"{entry.source}: unknown setting {label}{_suggestion(entry, known_names)}")
    unmapped = tuple((entry, reason) for entry in entries if (reason := reasons[entry.label]) is not None)
    if "output.save_every" in written:
        logger.info("output.save_every counts optimizer steps; use save_every_n_epochs to save by epochs")
    defaults = [Entry(name, value, DEFAULT_SOURCE, name) for name, value in DEFAULTS.items()]
    return Mapped(
        entries=tuple(entry for entry in mapped if entry.source != DEFAULT_SOURCE),
        defaults=(*defaults, *(entry for entry in mapped if entry.source == DEFAULT_SOURCE)),
        unmapped=unmapped,
    )


@dataclass(frozen=True)
class _Choices:
    """What a file chooses, on which other keys depend."""

    module: Any
    optimizer: Any
    saves_states: bool


def _network_module(entries: Sequence[Entry]) -> Any:
    """The module that a file's keys ask for; a network_type that is none stands for itself."""
    for entry in entries:
        if entry.label == "lora.network_type":
            return NETWORK_MODULES.get(str(entry.value), entry.value)
        if entry.name == "network_module":
            return entry.value
    return DEFAULTS["network_module"]


def _optimizer_type(entries: Sequence[Entry]) -> Any:
    for entry in entries:
        if entry.label == "optimizer.type" or entry.name == "optimizer_type":
            return OPTIMIZER_NAMES.get(str(entry.value).lower(), entry.value)
    return DEFAULTS["optimizer_type"]


def _saves_states(entries: Sequence[Entry]) -> bool:
    return not any(entry.name == "save_state" and _is_off(entry.value) for entry in entries)


def _reason_unmapped(entry: Entry, choices: _Choices, known_names: Collection[str]) -> str | None:
    """Why a known key becomes nothing; files often hold every key, also those of other networks and optimizers."""
    label, heading = entry.label, entry.label.partition(".")[0]
    if label in WITHOUT_COUNTERPART:
        return WITHOUT_COUNTERPART[label]
    if label.startswith("lora.lokr_") and choices.module == NETWORK_MODULES["lora"]:
        return "it is for LoKr, and a LoRA is trained"
    if label.startswith(PRODIGY_PREFIX) and "prodigy" not in str(choices.optimizer).lower():
        return f"it is for Prodigy, and the optimizer is {choices.optimizer}"
    if label == "output.save_state_every" and not choices.saves_states:
        return "save_state is off"
    if entry.name in NO_EFFECT:
        return NO_EFFECT[entry.name]
    return None if label in SAME_VALUE or entry.name in known_names else WITHOUT_COUNTERPART.get(heading)


def _overruled(entries: Sequence[Entry]) -> dict[str, str]:
    """The keys that others of the file win over, each with the reason."""
    winners = {entry.label for entry in entries if not _is_off(entry.value)}
    reasons = {}
    if "training.max_steps" in winners:
        reasons["training.epochs"] = "max_steps is above 0 and wins"
    if "training.lr_warmup_steps" in winners:
        reasons["training.lr_warmup_ratio"] = "lr_warmup_steps is above 0 and wins"
    if "output.output_name" in winners:
        reasons["lora.lora_name"] = "output.output_name names the files"
    return reasons


def _length(written: Mapping[str, Entry]) -> list[Entry]:
    """max_steps above 0 wins over epochs, and is then the only one given."""
    epochs, steps = written.get("training.epochs"), written.get("training.max_steps")
    if steps is not None and not _is_off(steps.value):
        return [replace(steps, name="max_train_steps")]
    return [replace(epochs, name="max_train_epochs")] if epochs is not None else []


def _schedule(written: Mapping[str, Entry]) -> list[Entry]:
    """cosine with a least rate is a schedule of its own here; warmup is given in steps, or else as a fraction."""
    schedule, ratio = written.get("training.lr_scheduler"), written.get("training.lr_min_ratio")
    mapped = []
    has_minimum = ratio is not None and not _is_off(ratio.value)
    if schedule is not None:
        name = "cosine_with_min_lr" if schedule.value == "cosine" and has_minimum else schedule.value
        mapped.append(replace(schedule, name="lr_scheduler", value=name))
    if has_minimum:
        mapped.append(replace(ratio, name="lr_scheduler_min_lr_ratio"))
    steps, fraction = written.get("training.lr_warmup_steps"), written.get("training.lr_warmup_ratio")
    warmup = fraction if steps is None or (_is_off(steps.value) and fraction is not None) else steps
    return [*mapped, replace(warmup, name="lr_warmup_steps")] if warmup is not None else mapped


def _precision(written: Mapping[str, Entry]) -> list[Entry]:
    entry = written.get("training.mixed_precision")
    if entry is None:
        return []
    return [replace(entry, value="no" if entry.value == "fp32" else entry.value)]


def _output_name(written: Mapping[str, Entry]) -> list[Entry]:
    entry = written.get("lora.lora_name")
    return [replace(entry, name="output_name")] if entry is not None and "output.output_name" not in written else []


def _states(written: Mapping[str, Entry]) -> list[Entry]:
    """save_state_every counts epochs; a state is only written together with the adapter."""
    entry = written.get("output.save_state_every")
    if entry is None or _is_off(entry.value):
        return []
    logger.info("output.save_state_every counts epochs; the adapter is saved together with each state")
    return [replace(entry, name="save_every_n_epochs"), replace(entry, name="save_state", value=True)]


def _network(written: Mapping[str, Entry], module: Any, problems: list[str]) -> list[Entry]:
    kind = written.get("lora.network_type")
    if kind is not None and module not in NETWORK_MODULES.values():
        problems.append(f"{kind}: expected one of {', '.join(NETWORK_MODULES)}")
    mapped = [replace(kind, name="network_module", value=module)] if kind is not None else []
    defaults = LOKR_DEFAULTS if module == NETWORK_MODULES["lokr"] else {}
    return [*mapped, *argument_list("network_args", written, defaults, problems)]


def _optimizer(written: Mapping[str, Entry], optimizer: Any, problems: list[str]) -> list[Entry]:
    """AdamW and its variants get the weight decay, eps and betas that files of this form rely on."""
    kind = written.get("optimizer.type")
    mapped = [replace(kind, name="optimizer_type", value=optimizer)] if kind is not None else []
    defaults = ADAMW_DEFAULTS if str(optimizer).lower() in ADAMW_NAMES else {}
    return [*mapped, *argument_list("optimizer_args", {**betas(written), **written}, defaults, problems)]


def _is_off(value: Any) -> bool:
    """Whether the key asks for nothing; a number below 0 does so too."""
    return is_off(value) or (isinstance(value, int | float) and value < 0)


def _suggestion(entry: Entry, known_names: set[str]) -> str:
    """Nearest keys of this form first; the same last word under another heading counts as near."""
    own = [*SAME_VALUE, *ARGUMENTS, *COMPUTED, *WITHOUT_COUNTERPART]
    same_word = [key for key in own if key.rpartition(".")[2] == entry.name]
    if same_word:
        return f"; did you mean {' or '.join(same_word)}?"
    return did_you_mean(entry.label, own) or did_you_mean(entry.name, known_names)
