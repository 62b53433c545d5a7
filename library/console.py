"""The console reporter: the one place that writes to the terminal. Components log through `logging`; this shows it."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


class _TerminalHandler(logging.Handler):
    """Writes each record on a line of its own, above a progress bar that may be running."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        tqdm.write(text, file=sys.stderr)


def show_log_messages(is_main_process: bool = True) -> None:
    """Shows this project's log messages on stderr; other processes of a multi-GPU run show errors only."""
    handler = _TerminalHandler()
    level = logging.INFO if is_main_process else logging.ERROR
    for name in ("library", "networks", "tools", "train_network", "anima_train_network"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def show_error(error: BaseException) -> None:
    """Shows a user's error as a message without a traceback, set apart from what a launcher prints after it."""
    print(f"\nerror: {error}\n", file=sys.stderr)


def show(text: str) -> None:
    """Prints a result on stdout."""
    print(text)


def progress_bar(total: int, description: str, initial: int = 0, unit: str = "it", shown: bool = True) -> tqdm:
    """A progress bar with speed and time left on stderr."""
    return tqdm(total=total, initial=initial, desc=description, unit=unit, disable=not shown, dynamic_ncols=True)
