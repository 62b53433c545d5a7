"""Stopping a run between two steps."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from library.errors import UserError

logger = logging.getLogger(__name__)


class Interrupted(UserError):
    """The run was told to stop, and has saved."""


@dataclass
class StopRequest:
    """Whether the run was asked to stop after the running step."""

    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first Ctrl+C or SIGTERM asks for a stop after the running step; a second one ends at once."""
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        logger.warning("stopping after this step, then saving; once more stops at once without saving")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
