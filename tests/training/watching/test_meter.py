"""What the curves show."""

import json
from dataclasses import asdict

import pytest

from library.training.watching.meter import LossAverages, Meter


def test_the_average_is_a_mean_at_first_and_then_follows_slowly():
    meter = Meter()
    assert meter.read([4.0, 2.0, 3.0]) == {"loss/current": 3.0, "loss/average": pytest.approx(3.0)}
    assert meter.read([3.0] * 47 + [53.0])["loss/average"] == pytest.approx(4.0)


def test_an_epochs_average_is_over_its_own_steps():
    meter = Meter()
    meter.read([1.0])
    meter.read([2.0])
    assert meter.close_epoch() == 1.5
    meter.read([8.0])
    assert meter.close_epoch() == 8.0


def test_averages_go_on_from_what_a_state_has_kept():
    losses = [4.0, 2.0, 3.0, 7.0]
    straight, first = (Meter() for _ in range(2))
    first.read(losses[:2])
    second = Meter()
    second.averages = LossAverages(**json.loads(json.dumps(asdict(first.averages))))
    assert second.read(losses[2:]) == straight.read(losses) == {"loss/current": 7.0, "loss/average": 4.0}
    assert second.close_epoch() == straight.close_epoch() == 4.0


def test_a_loss_that_is_no_number_is_in_no_average():
    meter = Meter()
    assert meter.read([1.0, float("nan"), 3.0])["loss/average"] == 2.0
    assert meter.averages == LossAverages(2.0, 2, 4.0, 2)
