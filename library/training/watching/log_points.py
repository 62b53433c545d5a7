"""Log points: what the steps gave is drawn and judged, one step after it was there to be read.

The numbers take their way to main memory while the GPU works on the next step. Reading them at once would leave it
without work for as long as the host takes to draw, judge and launch: 16 ms of ten steps of 98 ms (H200).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from library.training.run import RunState
from library.training.step_records import StepRecords
from library.training.watching.guard import Guard, GuardSettings
from library.training.watching.meter import Meter
from library.training.watching.monitor import Monitor, MonitorSettings
from library.training.watching.trackers import Tracker


def judges_at_once(monitor: MonitorSettings, guard: GuardSettings) -> bool:
    """Whether what a log point finds may end the run or put it back, so that no further step should be taken first."""
    return monitor.anima_monitor_alert_policy == "raise" or guard.on_nonfinite in ("raise", "rollback")


class LogPoints:
    """Draws the curves of a run, and has its guard and monitor judge.

    gather: [x] -> [x of the first process, x of the second, …].
    """

    def __init__(
        self,
        records: StepRecords,
        meter: Meter,
        monitor: Monitor,
        guard: Guard,
        tracker: Tracker,
        gather: Callable[[list[Any]], list[Any]],
    ) -> None:
        self._records, self._meter, self._tracker = records, meter, tracker
        self._monitor, self._guard, self._gather = monitor, guard, gather
        self._reached: tuple[int, Mapping[str, float]] | None = None
        self._last_step: int | None = None

    def reach(self, step: int, rates: Mapping[str, float]) -> None:
        """Sends what the steps gave on its way; does nothing where that log point was reached before.

        `look` must have been called since the last other one.
        """
        if step == self._last_step:
            return
        self._last_step = step
        self._records.start(step, self._monitor.weights_norm())
        self._reached = step, rates

    def state_by_now(self, state: RunState) -> Callable[[], RunState]:
        """The state as it now is, for any thread to ask for; that waits for the numbers of steps that were not read."""
        then, known = replace(state), replace(self._meter.averages)
        outcomes, leaves_out = self._records.unread(), self._guard.leaves_out

        def completed() -> RunState:
            averages, found = replace(known), outcomes()
            averages.take_in(loss for loss, _ in found)
            full = replace(then, averages=asdict(averages))
            for numbers in found:
                full.count(all(map(math.isfinite, numbers)), leaves_out)
            return full

        return completed

    def look(self, state: RunState) -> None:
        """Draws and judges the log point that was reached, if any was. UserError where that should end the run."""
        if self._reached is None:
            return
        (step, rates), self._reached = self._reached, None
        records, weights_norm = self._records.finish()
        found = self._monitor.look(records, weights_norm)
        losses = self._meter.read([record.loss for record in records])
        self._tracker.log({**losses, **rates, **found.values}, step)
        self._tracker.look(records, found.alerts, step)
        self._guard.check(records, state)
        self._monitor.report(found, self._gather)
