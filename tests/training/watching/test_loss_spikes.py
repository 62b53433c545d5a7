"""Which losses are far above what is usual at their timesteps."""

import random
import statistics
from pathlib import Path

import pytest

from library.training.step_records import SampleLoss, StepRecord
from library.training.watching.loss_spikes import LossSpikes


def step(number: int, *samples: tuple[float, float]) -> StepRecord:
    """A step with samples of (timestep, loss)."""
    of_pictures = tuple(SampleLoss(Path(f"{index}.png"), *sample) for index, sample in enumerate(samples))
    return StepRecord(number, sum(loss for _, loss in samples) / len(samples), 1.0, of_pictures)


def usual_loss(timestep: float) -> float:
    """About as a flow's: high near the picture and near noise."""
    return 0.1 + 2 * (timestep - 0.5) ** 2


def watched(spikes: LossSpikes, steps: int, scatter: float = 0.2) -> list[int]:
    """Steps of one sample at random timesteps; the numbers of those that were spikes."""
    draw = random.Random(0)
    found = []
    for number in range(steps):
        timestep = draw.random()
        if spikes.spike(step(number, (timestep, usual_loss(timestep) * draw.lognormvariate(0, scatter)))):
            found.append(number)
    return found


def test_the_scatter_of_a_healthy_run_is_no_spike():
    assert watched(LossSpikes(3.0), 3000) == []


def test_a_loss_that_is_usual_at_another_timestep_is_a_spike():
    """0.55 is what t = 0.97 gives, and five times what t = 0.5 does."""
    spikes = LossSpikes(3.0)
    watched(spikes, 1000)
    assert spikes.spike(step(1001, (0.97, 0.55))) is None
    found = spikes.spike(step(1002, (0.51, 0.1), (0.52, 0.95)))
    assert (found.step, found.loss) == (1002, pytest.approx(0.525))
    assert found.expected == pytest.approx(usual_loss(0.55), rel=0.1)
    assert [str(sample.path) for sample in found.worst] == ["1.png", "0.png"]


def test_the_ratio_is_of_a_steps_mean():
    spikes = LossSpikes(3.0)
    for number in range(30):
        spikes.spike(step(number, (0.5, 0.9 + 0.2 * (number % 2))))
    assert spikes.spike(step(31, (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), (0.5, 7.0))) is None  # 2.5 times
    assert spikes.spike(step(32, (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), (0.5, 12.0))) is not None


def test_nothing_is_judged_before_20_samples_are_known():
    spikes = LossSpikes(3.0)
    for number in range(20):
        assert spikes.spike(step(number, (0.5, 100.0 if number == 19 else 1.0))) is None
    assert spikes.spike(step(20, (0.9, 500.0))) is None
    assert spikes.spike(step(21, (0.5, 500.0))) is not None


def test_where_losses_scatter_widely_three_times_the_mean_is_none():
    draw, spikes = random.Random(1), LossSpikes(3.0)
    kept = [min(draw.lognormvariate(0, 1), 3.0) for _ in range(150)]
    for number, loss in enumerate(kept):
        spikes.spike(step(number, (0.5, loss)))
    limit = statistics.fmean(kept) + 4 * statistics.pstdev(kept)
    assert limit > 3.5 * statistics.fmean(kept)
    copy = LossSpikes(3.0)
    copy.load_state_dict(spikes.state_dict())
    assert copy.spike(step(200, (0.5, limit * 0.999))) is None
    assert spikes.spike(step(200, (0.5, limit * 1.001))) is not None


def test_a_spike_does_not_hide_the_next_one():
    spikes = LossSpikes(3.0)
    watched(spikes, 500)
    for number in range(3):
        assert spikes.spike(step(600 + number, (0.5, 1000.0))) is not None


def test_steps_that_are_not_finite_are_left_to_the_guard():
    spikes = LossSpikes(3.0)
    before = spikes.state_dict()
    assert spikes.spike(step(1, (0.5, float("nan")))) is None
    assert spikes.state_dict() == before
