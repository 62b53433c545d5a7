"""Ending with the launcher: `accelerate launch` does not pass SIGTERM on to the trainer, which would go on alone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_launcher() -> bool:
    """On Linux: this process gets SIGTERM when the accelerate launcher that started it ends, however it ends.

    So a run saves and stops where a job system ends the launcher. Returns whether that was arranged: a trainer started
    by a shell is left alone, as it may be meant to outlive that.
    """
    parent = os.getppid()
    if not sys.platform.startswith("linux") or not _is_accelerate(parent):
        return False
    arranged = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) == 0
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGTERM)
    return arranged


def _is_accelerate(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(Path(os.fsdecode(word)).name.startswith("accelerate") for word in words[:3])
