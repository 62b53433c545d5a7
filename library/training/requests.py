"""Saving on demand: `touch <output_dir>/save` from anywhere that sees the disk."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

SAVE, SAVE_AND_STOP = "save", "save_stop"


class SaveRequests:
    """Looks for files named save and save_stop in a folder, which is made for them; those of before are removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if old := self.take():
            logger.warning("removed %s, which was there before the run began", folder / old)

    def take(self) -> str | None:
        """Which of the two lies there, removed with this; save_stop where both do."""
        found = None
        for name in (SAVE, SAVE_AND_STOP):
            file = self._folder / name
            if file.is_file():
                file.unlink(missing_ok=True)
                found = name
        return found
