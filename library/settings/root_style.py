"""The single-file form with keys such as model.transformer_path, in terms of this trainer's settings.

`root_style_keys` says what each key becomes. A root-style file may also use any setting's own name, under any heading.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from library.errors import did_you_mean
from library.settings.entries import Entry
from library.settings.groups import by_spelling, top_level_options
from library.settings.kohya_only import FIXED, NO_EFFECT
from library.settings.root_style_keys import (
    ADAMW_DEFAULTS,
    ARGUMENTS,
    BETA_DEFAULTS,
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
    """Renames and computes; unknown keys are added to `problems`, known ones without counterpart are logged once."""
    written = {entry.label: entry for entry in entries}
    known_names = {*by_spelling(top_level_options()), *NO_EFFECT, *FIXED}
    mapped = [*_length(written), *_schedule(written), *_precision(written), *_output_name(written)]
    mapped += [*_network(written, problems), *_optimizer(written, problems)]
    unmapped = []
    for label, entry in written.items():
        heading = label.partition(".")[0]
        if label in SAME_VALUE:
            mapped.append(replace(entry, name=SAME_VALUE[label]))
        elif label in COMPUTED or _argument_target(label) is not None:
            continue
        elif label in WITHOUT_COUNTERPART or heading in WITHOUT_COUNTERPART:
            unmapped.append((entry, WITHOUT_COUNTERPART.get(label) or WITHOUT_COUNTERPART[heading]))
        elif entry.name in known_names:
            mapped.append(entry)
        else:
            problems.append(f"{entry.source}: unknown setting {label}{_suggestion(entry, known_names)}")
    for entry, reason in unmapped:
        _log_unmapped(entry, reason)
    if "output.save_every" in written:
        logger.info("output.save_every counts optimizer steps; use save_every_n_epochs to save by epochs")
    defaults = [Entry(name, value, DEFAULT_SOURCE, name) for name, value in DEFAULTS.items()]
    return Mapped(
        entries=tuple(entry for entry in mapped if entry.source != DEFAULT_SOURCE),
        defaults=(*defaults, *(entry for entry in mapped if entry.source == DEFAULT_SOURCE)),
        unmapped=tuple(unmapped),
    )


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


def _network(written: Mapping[str, Entry], problems: list[str]) -> list[Entry]:
    mapped = []
    kind = written.get("lora.network_type")
    if kind is not None and kind.value in list(NETWORK_MODULES):
        mapped.append(replace(kind, name="network_module", value=NETWORK_MODULES[kind.value]))
    elif kind is not None:
        problems.append(f"{kind}: expected one of {', '.join(NETWORK_MODULES)}")
    is_lokr = kind is not None and kind.value == "lokr"
    return [*mapped, *_argument_list("network_args", written, LOKR_DEFAULTS if is_lokr else {}, problems)]


def _optimizer(written: Mapping[str, Entry], problems: list[str]) -> list[Entry]:
    """AdamW and its variants get the weight decay, eps and betas that files of this form rely on."""
    kind = written.get("optimizer.type")
    name = "AdamW" if kind is None else OPTIMIZER_NAMES.get(str(kind.value).lower(), kind.value)
    mapped = [replace(kind, name="optimizer_type", value=name)] if kind is not None else []
    defaults = ADAMW_DEFAULTS if str(name).lower().startswith("adamw") else {}
    return [*mapped, *_argument_list("optimizer_args", {**_betas(written), **written}, defaults, problems)]


def _betas(written: Mapping[str, Entry]) -> dict[str, Entry]:
    """beta1 and beta2 make one argument; one given alone leaves the other at its default."""
    given = [written[key] for key in BETA_DEFAULTS if key in written]
    if not given:
        return {}
    values = [written[key].value if key in written else default for key, default in BETA_DEFAULTS.items()]
    label = ", ".join(entry.label for entry in given)
    return {"optimizer.betas": Entry("betas", f"({values[0]},{values[1]})", given[0].source, label)}


def _argument_list(
    setting: str, written: Mapping[str, Entry], defaults: Mapping[str, Any], problems: list[str]
) -> list[Entry]:
    """One entry for a key=value setting, from the keys that map to its arguments on top of the defaults."""
    arguments, used = dict(defaults), []
    for label, entry in written.items():
        target = _argument_target(label)
        if target is None or target[0] != setting:
            continue
        values = entry.value if isinstance(entry.value, list) else [entry.value]
        if not all(isinstance(value, str | int | float) for value in values):
            problems.append(f"{entry}: expected a number, a text, true, false or a list of texts")
        arguments[target[1]] = ",".join(map(str, values))
        used.append(entry)
    if not arguments:
        return []
    texts = [f"{name}={value}" for name, value in arguments.items()]
    source, label = (used[0].source, ", ".join(entry.label for entry in used)) if used else (DEFAULT_SOURCE, setting)
    return [Entry(setting, texts, source, label)]


def _argument_target(label: str) -> tuple[str, str] | None:
    """The list setting and the argument's name for a key such as optimizer.eps or optimizer.prodigy_d_coef."""
    if label.startswith(PRODIGY_PREFIX):
        return "optimizer_args", label.removeprefix(PRODIGY_PREFIX)
    return ARGUMENTS.get(label)


def _log_unmapped(entry: Entry, reason: str) -> None:
    if not _is_off(entry.value):
        logger.warning("%s: %s is not used: %s", entry.source, entry.label, reason)


def _is_off(value: Any) -> bool:
    """false, 0 or less, "", "none": the key asks for nothing."""
    is_number = isinstance(value, int | float)
    return not value or (is_number and value <= 0) or str(value).strip().lower() in ("0", "false", "none", "off")


def _suggestion(entry: Entry, known_names: set[str]) -> str:
    """Nearest keys of this form first; the same last word under another heading counts as near."""
    own = [*SAME_VALUE, *ARGUMENTS, *COMPUTED, *WITHOUT_COUNTERPART]
    same_word = [key for key in own if key.rpartition(".")[2] == entry.name]
    if same_word:
        return f"; did you mean {' or '.join(same_word)}?"
    return did_you_mean(entry.label, own) or did_you_mean(entry.name, known_names)
