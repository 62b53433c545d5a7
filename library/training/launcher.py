"""Ending with the launcher: `accelerate launch` does not pass SIGTERM on to the trainer, which would go on alone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_launcher() -> bool:
    """On Linux: this process gets SIGUSR1 when the accelerate launcher that started it ends, however it ends.

    So a run saves and stops where a job system ends the launcher. It comes once for each of the launcher's threads, and
    after a Ctrl+C that has ended both, so it is none of the signals of which a second one ends a run at once; see
    `interrupts`. Returns whether that was arranged: a trainer started by a shell is left alone, as it may be meant to
    outlive that.
    """
    parent = os.getppid()
    if not sys.platform.startswith("linux") or not _is_accelerate(parent):
        return False
    arranged = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1) == 0
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGUSR1)
    return arranged


def _is_accelerate(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(Path(os.fsdecode(word)).name.startswith("accelerate") for word in words[:3])
