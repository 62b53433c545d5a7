"""Where a setting was written, for messages."""

from __future__ import annotations

import re

from library.settings.entries import Given
from library.settings.groups import Settings


def given_at(settings: Settings, name: str, prefix: str = "") -> Given | None:
    """What was given for a setting; `prefix` (datasets[0]. or datasets[0].subsets[1].) names where to look first."""
    levels = [prefix, prefix.partition(".")[0] + ".", "general.", ""] if prefix else [""]
    return next((settings.given[level + name] for level in levels if level + name in settings.given), None)


def origin(settings: Settings, name: str, prefix: str = "") -> str:
    """The setting as its author wrote it, with its source; its name where nobody gave it."""
    found = given_at(settings, name, prefix)
    return name if found is None else f"{found.source}: {found.label}"


def placed(settings: Settings, message: str) -> str:
    """A component's message, with the source of each setting whose name a line of it begins with, where it was given.

    Components know names alone.
    """
    return re.sub(r"^\w+(?=[: ])", lambda name: origin(settings, name[0]), message, flags=re.MULTILINE)
