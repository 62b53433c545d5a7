"""Settings of the guard, the monitor and the average that do nothing are told; impossible values are refused."""

import pytest

from library.errors import SettingError
from library.settings import read_settings


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("--ema_power 0.7", "--ema_power does nothing: ema_decay is not set"),
        ("--ema_device cpu", "--ema_device does nothing: ema_decay is not set"),
        (
            "--no-anima_monitor_memory --anima_monitor_memory_warn_ratio 0.8",
            "--anima_monitor_memory_warn_ratio does nothing: anima_monitor_memory is off",
        ),
        (
            "--anima_monitor_alert_policy raise --on_nonfinite rollback",
            "--on_nonfinite does nothing: anima_monitor_alert_policy = raise ends the run at such a step",
        ),
        ("--ema_decay 0.99 --ema_power 0.7 --on_nonfinite raise --anima_monitor_memory_warn_ratio 0.8", None),
    ],
)
def test_what_does_nothing_is_said_by_name(needed_flags, caplog, words, idle):
    read_settings([*needed_flags, *words.split()])
    told = [message for message in caplog.messages if " does nothing: " in message]
    assert told == ([] if idle is None else [f"command line: {idle}"])


@pytest.mark.parametrize(
    "words", ["--ema_decay 1", "--anima_monitor_loss_spike_ratio 1", "--anima_monitor_memory_warn_ratio 2"]
)
def test_values_that_cannot_work_are_refused(needed_flags, words):
    with pytest.raises(SettingError, match=f"{words.split()[0]}: .* is out of range"):
        read_settings([*needed_flags, *words.split()])


def test_0_means_no_alert_and_no_average(needed_flags):
    settings = read_settings([*needed_flags, "--anima_monitor_loss_spike_ratio", "0", "--ema_decay", "0"])
    assert settings.monitor.anima_monitor_loss_spike_ratio is None
    assert settings.ema.ema_decay is None
