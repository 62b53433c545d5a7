"""The console reporter: the one place that writes to the terminal. Components log through `logging`; this shows it."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Between two lines about the same, where the terminal is a file and no line can be written anew.
SECONDS_BETWEEN_LINES = 10


class _TerminalHandler(logging.Handler):
    """Writes each record on a line of its own. While rich shows something live, stderr leads to above it."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        show_line(text)


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


def show_line(text: str) -> None:
    """Prints a line of a program's course on stderr."""
    print(text, file=sys.stderr, flush=True)


def live_console() -> Console | None:
    """The terminal behind stderr, whose lines can be written anew; None where stderr is a file or a pipe."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def readable_time(seconds: float) -> str:
    """ "45 s", "7 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Bar:
    """How far a piece of work has come: a bar with the time left in a terminal, else a line now and then."""

    def __init__(self, total: int, description: str, shown: bool) -> None:
        self._total, self._description = total, description
        self._done = 0
        self._last_line = time.monotonic()
        self._is_shown = shown
        console = live_console() if shown else None
        self._live = None if console is None else _live_bar(console)

    def __enter__(self) -> Bar:
        if self._live is not None:
            self._live.add_task(self._description, total=self._total)
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._live is not None:
            self._live.advance(self._live.task_ids[0], count)
        elif self._is_shown and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            show_line(f"{self._description}: {self._done} of {self._total}")


def progress_bar(total: int, description: str, shown: bool = True) -> Bar:
    """A bar on stderr: `with progress_bar(len(files), "reading files") as bar: … bar.update()`."""
    return Bar(total, description, shown)


def _live_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
