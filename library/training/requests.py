"""Saving and stopping on demand: `touch <output_dir>/save` from anywhere that sees the disk."""

from __future__ import annotations

import logging
from enum import IntEnum
from pathlib import Path

logger = logging.getLogger(__name__)


class Wish(IntEnum):
    """What may be wished for between two steps; a greater one includes the lesser."""

    NOTHING = 0
    SAVE = 1
    SAVE_AND_STOP = 2


_FILES = {Wish.SAVE: "save", Wish.SAVE_AND_STOP: "save_stop"}


class SaveRequests:
    """Looks for files named save and save_stop in a folder; those from before the run are removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if old := self.take():
            logger.warning("removed %s, which was there before the run began", folder / _FILES[old])

    def take(self) -> Wish:
        """What the files that lie there, removed with this, ask for."""
        found = Wish.NOTHING
        for wish, name in _FILES.items():
            file = self._folder / name
            if file.is_file():
                file.unlink(missing_ok=True)
                found = wish
        return found
