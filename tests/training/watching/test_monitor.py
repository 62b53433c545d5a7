"""Curves and alerts at a log point."""

from pathlib import Path

import pytest
import torch
from torch import nn

from library.training.step_records import SampleLoss, StepRecord
from library.training.watching.monitor import AlertError, Monitor, MonitorSettings

CPU = torch.device("cpu")


def network() -> nn.Module:
    module = nn.Linear(3, 1)
    nn.init.constant_(module.weight, 2.0)
    nn.init.constant_(module.bias, 2.0)
    return module


def records(*losses: float) -> list[StepRecord]:
    return [
        StepRecord(number, loss, 0.25, (SampleLoss(Path("a.png"), 0.5, loss),))
        for number, loss in enumerate(losses, start=1)
    ]


@pytest.fixture
def gpu(monkeypatch):
    """gpu(peak, free) makes the memory of a card of 1000 MiB, of which 100 are reserved, look so."""

    def look(peak: int, free: int) -> torch.device:
        values = {"memory_allocated": 50, "memory_reserved": 100, "max_memory_allocated": peak}
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value * 2**20)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**20, 1000 * 2**20))
        return torch.device("cuda", 0)

    return look


def test_the_weights_norm_is_of_all_together():
    assert Monitor(MonitorSettings(), network(), CPU).weights_norm().item() == 4.0


def test_a_healthy_run_has_norms_and_no_alerts():
    findings = Monitor(MonitorSettings(), network(), CPU).look(records(1.0, 1.0), 4.0)
    assert findings.values == {
        "norm/weights": 4.0,
        "norm/gradient": 0.25,
        "alert/nonfinite_loss": 0.0,
        "alert/loss_spike": 0.0,
        "alert/memory_near_limit": 0.0,
        "alert/any": 0.0,
    }
    assert findings.alerts == ()


def test_a_loss_that_is_no_number_is_on_the_curve_and_told_by_the_guard():
    findings = Monitor(MonitorSettings(), network(), CPU).look(records(1.0, float("nan")), 4.0)
    assert (findings.values["alert/nonfinite_loss"], findings.values["alert/any"]) == (1.0, 1.0)
    assert findings.alerts == ()


def test_a_spike_is_told_with_its_pictures_and_ends_the_run_where_asked(caplog):
    for policy in ("warn", "raise"):
        monitor = Monitor(MonitorSettings(anima_monitor_alert_policy=policy), network(), CPU)
        findings = monitor.look(records(*[1.0] * 25, 8.0), 4.0)
        assert (findings.values["alert/loss_spike"], findings.values["alert/any"]) == (1.0, 1.0)
        message = "step 26: the loss is 8, where 1 is usual at these timesteps; pictures, worst first: a.png"
        if policy == "warn":
            monitor.report(findings)
            assert message in caplog.text
        else:
            with pytest.raises(AlertError, match=message):
                monitor.report(findings)


def test_spikes_can_be_left_alone():
    monitor = Monitor(MonitorSettings(anima_monitor_loss_spike_ratio=None), network(), CPU)
    assert monitor.look(records(*[1.0] * 25, 8.0), 4.0).alerts == ()


def test_memory_is_what_this_run_needed_at_most_and_what_others_hold(gpu):
    """100 MiB of others: 1000 - 800 free - 100 reserved here."""
    values = Monitor(MonitorSettings(), network(), gpu(peak=80, free=800)).look([], 4.0).values
    assert {name: value for name, value in values.items() if name.startswith("gpu/")} == {
        "gpu/mem_allocated_mb": 50.0,
        "gpu/mem_reserved_mb": 100.0,
        "gpu/mem_peak_allocated_mb": 80.0,
        "gpu/mem_usage_ratio": pytest.approx(0.18),
    }


def test_memory_near_its_limit_is_told_once_until_it_no_longer_is(gpu):
    monitor = Monitor(MonitorSettings(), network(), gpu(peak=80, free=20))
    (alert,) = monitor.look([], 4.0).alerts
    assert "96% of the GPU's memory is in use" in alert
    again = monitor.look([], 4.0)
    assert (again.alerts, again.values["alert/memory_near_limit"]) == ((), 1.0)
    gpu(peak=80, free=100)
    assert monitor.look([], 4.0).values["alert/memory_near_limit"] == 0.0
    gpu(peak=80, free=20)
    assert len(monitor.look([], 4.0).alerts) == 1


def test_memory_is_left_alone_where_asked(gpu):
    values = Monitor(MonitorSettings(anima_monitor_memory=False), network(), gpu(80, 0)).look([], 4.0).values
    assert not [name for name in values if name.startswith("gpu/")]
    assert values["alert/memory_near_limit"] == 0.0


def test_what_is_usual_outlives_a_resume():
    first, second = (Monitor(MonitorSettings(), network(), CPU) for _ in range(2))
    first.look(records(*[1.0] * 25), 4.0)
    second.load_state_dict(first.state_dict())
    assert second.look(records(8.0), 4.0).values["alert/loss_spike"] == 1.0
