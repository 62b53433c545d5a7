"""Where a setting was written, for messages."""

from __future__ import annotations

from library.settings.groups import Settings


def origin(settings: Settings, name: str, prefix: str = "") -> str:
    """The setting as its author wrote it, with its source; `prefix` names a dataset or subset to look in first."""
    levels = [prefix, prefix.partition(".")[0] + ".", "general.", ""] if prefix else [""]
    for level in levels:
        if level + name in settings.given:
            found = settings.given[level + name]
            return f"{found.source}: {found.label}"
    return name
