"""Stopping a run between two steps."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from library.errors import UserError

logger = logging.getLogger(__name__)

# A launcher passes on what the terminal has sent to all already. Nobody asks twice within so many seconds.
_ECHO_SECONDS = 2.0
# These ask for a stop however often they come, where the system has them: the launcher has ended (see `launcher`; job
# systems announce their end by it as well), or the terminal has.
_LASTING = [getattr(signal, name) for name in ("SIGUSR1", "SIGHUP") if hasattr(signal, name)]


class Interrupted(UserError):
    """The run was told to stop, and has saved."""


class StopRequest:
    """Whether the run was asked to stop after the running step."""

    def __init__(self) -> None:
        self._asked_at: float | None = None

    @property
    def requested(self) -> bool:
        return self._asked_at is not None

    def ask(self, number: int) -> None:
        """Takes a signal. KeyboardInterrupt for one that asks again."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            logger.warning("stopping after this step, then saving; once more, later, stops at once without saving")
        elif number not in _LASTING and time.monotonic() - self._asked_at > _ECHO_SECONDS:
            raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first Ctrl+C or SIGTERM asks for a stop after the running step; a later one ends at once.

    SIGUSR1 and SIGHUP ask for a stop alone, SIGHUP unless it is ignored, as under nohup. Where one was asked for, both
    are ignored afterwards: a launcher that ends beside the run is not to end it before its last words.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.ask(number)

    hang_up = getattr(signal, "SIGHUP", None)
    previous = {
        number: signal.signal(number, handle)
        for number in (signal.SIGINT, signal.SIGTERM, *_LASTING)
        if number != hang_up or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if stop.requested and number in _LASTING else handler)
