"""The run in the terminal while it goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from library.console import SECONDS_BETWEEN_LINES, live_console, readable_time, show_line
from library.training.watching.sinks import Sink

_REFRESHES_PER_SECOND = 2


class RunDisplay(Sink):
    """A few lines that are written anew, where stderr is a terminal; else a line at a log point now and then.

    Both tell step, loss, rate, speed, memory and time left; the lines in a terminal also the last save and alert,
    and how the run ended.
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        """console: where something live can be shown; None for the terminal, if there is one."""
        self._total_steps = total_steps
        self._step = 0
        self._values: dict[str, float] = {}
        self._last: dict[str, str] = {}
        self._last_line: float | None = None
        console = console or live_console()
        self._live: Live | None = None
        if console is not None:
            self._live = Live(console=console, get_renderable=self._rendered, refresh_per_second=_REFRESHES_PER_SECOND)

    def advance(self, step: int) -> None:
        self._step = step
        if self._live is not None and not self._live.is_started:
            self._live.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        self._values.update(values)
        if self._live is not None or "loss/current" not in values:
            return
        now = time.monotonic()
        is_last = step >= self._total_steps
        if is_last or self._last_line is None or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            show_line(f"step {step} of {self._total_steps}: {self._numbers()}")

    def event(self, kind: str, step: int, text: str) -> None:
        self._last[kind] = f"{text} (step {step})"

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _numbers(self) -> str:
        """The last known values, as far as there are any: "loss 0.1203, average 0.1310, rate 1e-04, 0.24 s a step"."""
        values = self._values
        known = {
            "loss/current": "loss {:.4f}",
            "loss/average": "average {:.4f}",
            "loss/validation/average": "validation {:.4f}",
            "time/seconds_per_step": "{:.3g} s a step",
            "gpu/mem_peak_allocated_mb": "peak memory {:.0f} MiB",
        }
        parts = [text.format(values[name]) for name, text in known.items() if name in values]
        rates = {name.removeprefix("lr/"): f"{value:.3g}" for name, value in values.items() if name.startswith("lr/")}
        if len(set(rates.values())) == 1:
            parts.append(f"rate {next(iter(rates.values()))}")
        else:
            parts += [f"rate of {name} {rate}" for name, rate in rates.items()]
        if "time/seconds_left" in values:
            parts.append(f"{readable_time(values['time/seconds_left'])} left")
        return ", ".join(parts)

    def _rendered(self) -> Group:
        bar = Table.grid(padding=(0, 1))
        share = f"{self._step / self._total_steps:.0%}"
        bar.add_row(
            f"step {self._step} of {self._total_steps}",
            ProgressBar(total=self._total_steps, completed=self._step, width=40),
            share,
        )
        # An end's text goes on from there: "stopped", "ended by ValueError: …".
        events = (f"run {text}" if kind == "end" else f"last {kind}: {text}" for kind, text in self._last.items())
        lines = [self._numbers(), *events]
        return Group(bar, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines if line))
