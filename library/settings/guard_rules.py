"""Which settings of the guard, the monitor and the average do nothing beside the others."""

from __future__ import annotations

from collections.abc import Iterator

from library.settings.groups import Settings


def guard_without_effect(settings: Settings) -> Iterator[tuple[str, str]]:
    """Option and reason, for each that does nothing."""
    if settings.ema.ema_decay is None:
        for name in ("ema_power", "ema_device"):
            yield name, "ema_decay is not set"
    if not settings.monitor.anima_monitor_memory:
        yield "anima_monitor_memory_warn_ratio", "anima_monitor_memory is off"
    if settings.monitor.anima_monitor_alert_policy == "raise":
        yield "on_nonfinite", "anima_monitor_alert_policy = raise ends the run at such a step"
