"""Shows a run's curves in the browser for as long as it goes on."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from library.training.watching.sinks import Sink

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[3]
_SECONDS_TO_END = 5


class TensorBoardServer(Sink):
    """TensorBoard in a process of its own, started without waiting for it; `close` ends it.

    A failure to start, and an end before that of the run, are warnings.
    """

    def __init__(self, folder: Path, host: str, port: int) -> None:
        """port: the first that is tried."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 — `close` closes it; a pipe that nobody reads would fill up
        program = [sys.executable, "-m", "library.training.watching.tensorboard_process"]
        self._process = subprocess.Popen(
            [*program, str(folder.resolve()), host, str(port)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # else Ctrl+C ends it while the trainer is still saving
        )
        self._is_closing = False
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def close(self) -> None:
        self._is_closing = True
        self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._watcher.join()
        self._errors.close()

    def _watch(self) -> None:
        """Tells the address when it is there, and what went wrong where the process ends by itself."""
        address = self._process.stdout.readline().decode().strip()
        if address:
            logger.info("TensorBoard: %s", address)
        code = self._process.wait()
        if not self._is_closing:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            reason = said[-1] if said else f"exit code {code}"
            logger.warning("TensorBoard ended: %s; curves are still written to files", reason)
