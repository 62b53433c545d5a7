"""What the curves show."""

import json

import pytest
import torch

from library.training.meter import Meter


def test_the_average_is_a_mean_at_first_and_then_follows_slowly():
    meter = Meter(0, torch.device("cpu"))
    for loss in (4.0, 2.0, 3.0):
        meter.add(torch.tensor(loss))
    assert meter.read(3, [4.0, 2.0, 3.0]) == {"loss/current": 3.0, "loss/average": pytest.approx(3.0)}
    for _ in range(47):
        meter.add(torch.tensor(3.0))
    meter.add(torch.tensor(53.0))
    assert meter.read(51, [3.0] * 47 + [53.0])["loss/average"] == pytest.approx(4.0)


def test_an_epochs_average_is_over_its_own_steps():
    meter = Meter(0, torch.device("cpu"))
    meter.add(torch.tensor(1.0))
    meter.read(1, [1.0])
    meter.add(torch.tensor(2.0))
    meter.read(2, [2.0])
    assert meter.close_epoch() == 1.5
    meter.add(torch.tensor(8.0))
    meter.read(3, [8.0])
    assert meter.close_epoch() == 8.0


def test_the_summary_gives_the_median_time_of_a_step(monkeypatch):
    clock = iter([0.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter(10, torch.device("cpu"))
    for step in (11, 13, 15):
        meter.add(torch.tensor(1.0))
        meter.read(step, [1.0])
    assert meter.summary() == "500 ms a step (median over log points)"


def test_a_resumed_run_has_the_averages_of_one_without_a_break():
    losses = [4.0, 2.0, 3.0, 7.0]
    straight, first, second = (Meter(step, torch.device("cpu")) for step in (0, 0, 2))
    for loss in losses[:2]:
        first.add(torch.tensor(loss))
    first.read(2, losses[:2])
    second.restore(json.loads(json.dumps(first.averages())))
    for loss in losses:
        straight.add(torch.tensor(loss))
    for loss in losses[2:]:
        second.add(torch.tensor(loss))
    assert second.read(4, losses[2:]) == straight.read(4, losses) == {"loss/current": 7.0, "loss/average": 4.0}
    assert second.close_epoch() == straight.close_epoch() == 4.0


def test_averages_are_those_of_the_last_log_point_until_the_rest_is_read():
    meter = Meter(0, torch.device("cpu"))
    for loss in (1.0, 3.0, 8.0):
        meter.add(torch.tensor(loss))
    meter.read(2, [1.0, 3.0])
    assert meter.averages()["average"] == 2.0
    meter.read_rest()
    assert meter.averages()["average"] == 4.0
    meter.read_rest()
    assert meter.averages()["losses_read"] == 3
