"""Root-style keys that become entries of key=value settings: network_args and optimizer_args."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from library.settings.entries import Entry
from library.settings.root_style_keys import ARGUMENTS, BETA_DEFAULTS, DEFAULT_SOURCE, PRODIGY_PREFIX


def betas(written: Mapping[str, Entry]) -> dict[str, Entry]:
    """beta1 and beta2 make one argument; one given alone leaves the other at its default."""
    given = [written[key] for key in BETA_DEFAULTS if key in written]
    if not given:
        return {}
    values = [written[key].value if key in written else default for key, default in BETA_DEFAULTS.items()]
    label = ", ".join(entry.label for entry in given)
    return {"optimizer.betas": Entry("betas", f"({values[0]},{values[1]})", given[0].source, label)}


def argument_list(
    setting: str, written: Mapping[str, Entry], defaults: Mapping[str, Any], problems: list[str]
) -> list[Entry]:
    """One entry for a key=value setting: the file's own list, the keys that map to its arguments, the defaults.

    Two spellings of an argument that differ are a problem; "lokr_factor" and "factor" are one.
    """
    found: dict[str, tuple[str, Entry]] = {}
    for label, entry in written.items():
        for name, text in _arguments_of(label, entry, setting, problems):
            argument = name.removeprefix("lokr_")
            earlier = found.get(argument)
            if earlier is not None and earlier[0].partition("=")[2].lower() != text.lower():
                problems.append(f"{entry}: contradicts {earlier[1]}; keep one")
            found[argument] = (f"{name}={text}", entry)
    texts = {name.removeprefix("lokr_"): f"{name}={value}" for name, value in defaults.items()}
    texts |= {argument: text for argument, (text, _) in found.items()}
    if not texts:
        return []
    used = list(dict.fromkeys(entry.label for _, entry in found.values()))
    source = next((entry.source for _, entry in found.values()), DEFAULT_SOURCE)
    return [Entry(setting, list(texts.values()), source, ", ".join(used) or setting)]


def _arguments_of(label: str, entry: Entry, setting: str, problems: list[str]) -> Iterator[tuple[str, str]]:
    """What the entry under a label says of a key=value setting, as (argument, text)."""
    target = argument_target(label)
    values = entry.value if isinstance(entry.value, list) else [entry.value]
    if target is not None and target[0] == setting:
        if not all(isinstance(value, str | int | float) for value in values):
            problems.append(f"{entry}: expected a number, a text, true, false or a list of texts")
        yield target[1], ",".join(map(str, values))
    elif target is None and entry.name == setting:
        for value in values:
            name, separator, text = str(value).partition("=")
            if separator:
                yield name.strip(), text.strip()
            elif value != "":
                problems.append(f"{entry}: {value!r} is not of the form key=value")


def argument_target(label: str) -> tuple[str, str] | None:
    """The list setting and the argument's name for a key such as optimizer.eps or optimizer.prodigy_d_coef."""
    if label.startswith(PRODIGY_PREFIX):
        return "optimizer_args", label.removeprefix(PRODIGY_PREFIX)
    return ARGUMENTS.get(label)
