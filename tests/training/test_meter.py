"""What the curves show."""

import json
from dataclasses import asdict

import pytest
import torch

from library.training.meter import LossAverages, Meter


def test_the_average_is_a_mean_at_first_and_then_follows_slowly():
    meter = Meter(0, torch.device("cpu"))
    assert meter.read(3, [4.0, 2.0, 3.0]) == {"loss/current": 3.0, "loss/average": pytest.approx(3.0)}
    assert meter.read(51, [3.0] * 47 + [53.0])["loss/average"] == pytest.approx(4.0)


def test_an_epochs_average_is_over_its_own_steps():
    meter = Meter(0, torch.device("cpu"))
    meter.read(1, [1.0])
    meter.read(2, [2.0])
    assert meter.close_epoch() == 1.5
    meter.read(3, [8.0])
    assert meter.close_epoch() == 8.0


def test_the_summary_gives_the_median_time_of_a_step(monkeypatch):
    clock = iter([0.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter(10, torch.device("cpu"))
    for step in (11, 13, 15):
        meter.read(step, [1.0])
    assert meter.summary() == "500 ms a step (median over log points)"


def test_averages_go_on_from_what_a_state_has_kept():
    losses = [4.0, 2.0, 3.0, 7.0]
    straight, first = (Meter(0, torch.device("cpu")) for _ in range(2))
    first.read(2, losses[:2])
    second = Meter(2, torch.device("cpu"))
    second.averages = LossAverages(**json.loads(json.dumps(asdict(first.averages))))
    assert second.read(4, losses[2:]) == straight.read(4, losses) == {"loss/current": 7.0, "loss/average": 4.0}
    assert second.close_epoch() == straight.close_epoch() == 4.0


def test_a_loss_that_is_no_number_is_in_no_average():
    meter = Meter(0, torch.device("cpu"))
    assert meter.read(3, [1.0, float("nan"), 3.0])["loss/average"] == 2.0
    assert meter.averages == LossAverages(2.0, 2, 4.0, 2)
