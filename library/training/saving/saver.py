"""Saving beside training: a thread writes one save after the other, from copies that training does not change."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Queue
from threading import Thread

from library.errors import UserError
from library.training.machine import free_bytes, readable_size
from library.training.saving.rotation import remove_outdated, saved_files, size_of
from library.training.saving.settings import SavingSettings
from library.training.saving.upload import Uploader

logger = logging.getLogger(__name__)

Write = Callable[[], Sequence[Path]]

# Saves that may wait while one is written. Those of an epoch, of a step and of the best adapter can fall together; more
# would only fill main memory with copies.
_MOST_WAITING = 2


class Saver:
    """Writes saves. Each is complete or absent; one that fails leaves what was there, is told, and ends no run.

    uploader: gets each complete save.
    """

    def __init__(self, settings: SavingSettings, uploader: Uploader | None = None) -> None:
        self._settings = settings
        self._uploader = uploader
        self._thread: Thread | None = None
        self._waiting: Queue[tuple[str, Write]] = Queue(_MOST_WAITING)
        self.failure: str | None = None

    def start(self, name: str, write: Write) -> None:
        """Has a save written after those before it; where too many of them wait, this waits as well.

        write: writes its files and folders, and names them.
        """
        if self._thread is None:
            # A daemon: when the user stops the program at once, the files that are not complete yet stay absent.
            self._thread = Thread(target=self._work, name="saving", daemon=True)
            self._thread.start()
        self._waiting.put((name, write))

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        self._waiting.join()

    def finish(self) -> None:
        """Waits for the last save and its upload. UserError where the save failed."""
        self.wait()
        if self._uploader is not None:
            self._uploader.finish()
        if self.failure is not None:
            raise UserError(self.failure)

    def _work(self) -> None:
        while True:
            name, write = self._waiting.get()
            try:
                self._save(name, write)
            except Exception as error:  # of what follows a save; the thread goes on, or training would wait forever
                logger.warning("after saving %s: %s: %s", name, type(error).__name__, error)
            finally:
                del write  # and with it the copies that it holds
                self._waiting.task_done()

    def _save(self, name: str, write: Write) -> None:
        self.failure = None
        try:
            written = write()
        except Exception as error:  # whatever it was, training goes on and saves again
            self.failure = f"saving {name} failed: {self._explained(error)}"
            logger.warning("%s. Earlier saves are as they were", self.failure)
            return
        for path in written:
            logger.info("saved %s", path.resolve())
        self._remove_outdated(name)
        if self._uploader is not None:
            self._uploader.add(written)

    def _remove_outdated(self, name: str) -> None:
        try:
            remove_outdated(self._settings, name)
        except OSError as error:
            logger.warning("what save_last_n_... no longer keeps cannot be removed: %s", error)

    def _explained(self, error: Exception) -> str:
        if not isinstance(error, OSError):
            return f"{type(error).__name__}: {error}"
        folder = self._settings.output_dir
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return f"{error.strerror or error} ({folder})"
        sizes = {path: size_of(path) for path in saved_files(self._settings)}
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        listed = ", ".join(f"{path.name} ({readable_size(sizes[path])})" for path in largest)
        return f"the disk of {folder} is full ({readable_size(free_bytes(folder))} free). Free some room there" + (
            f", for instance by moving away the largest saves: {listed}" if listed else ""
        )
