"""caption_mix: how often a caption is the tags, the natural language (nl), or one after the other."""

from __future__ import annotations

import math
from typing import Any

# The fields that each form shows, in order.
FORMS: dict[str, tuple[str, ...]] = {
    "tags": ("tags",),
    "nl": ("nl",),
    "tags+nl": ("tags", "nl"),
    "nl+tags": ("nl", "tags"),
}


def parse_caption_mix(value: Any) -> str:
    """The value itself, if `mix_weights` can read it; ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError('expected a text such as "tags=0.4, nl=0.3, tags+nl=0.3"')
    mix_weights(value)
    return value


def mix_weights(mix: str) -> dict[str, float]:
    """The weights of FORMS, relative to each other: 'tags=2, nl=1' -> {"tags": 2.0, "nl": 1.0}.

    ValueError: another form, a form twice, a weight that is no number of 0 or more, or no weight above 0.
    """
    weights: dict[str, float] = {}
    for entry in mix.split(","):
        name, _, number = (part.strip() for part in entry.partition("="))
        form = name.replace(" ", "")
        if form not in FORMS:
            raise ValueError(f"{name!r} is none of the forms {', '.join(FORMS)}")
        if form in weights:
            raise ValueError(f"{form} is there twice")
        weights[form] = _weight(form, number)
    if not any(weights.values()):
        raise ValueError("at least one weight must be above 0")
    return weights


def _weight(form: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"expected {form}=0.5 or another weight of 0 or more, not {text!r}")
    return weight
