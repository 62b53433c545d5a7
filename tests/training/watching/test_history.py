import math
from pathlib import Path

import pytest
from PIL import Image

from library.training.step_records import SampleLoss, StepRecord
from library.training.watching.history import RunHistory

A, B = Path("a.png"), Path("b.png")


def record(step, *samples):
    return StepRecord(step, 1.0, 1.0, tuple(SampleLoss(*sample) for sample in samples))


def test_pictures_are_compared_at_their_own_timesteps():
    history = RunHistory(total_steps=4)
    # Near noise losses are ten times higher for both; B is three times as hard as A wherever they meet.
    history.look([record(1, (A, 0.05, 1.0), (B, 0.01, 3.0)), record(2, (A, 0.95, 10.0), (B, 1.0, 30.0))])
    worst, best = history.pictures()
    assert (worst.path, worst.samples, worst.loss) == (B, 2, 16.5)
    assert (worst.against_usual, best.against_usual) == (pytest.approx(1.5), pytest.approx(0.5))
    # A picture that only met the high losses is not worse for that.
    history.look([record(3, (Path("c.png"), 0.92, 20.0))])
    assert [picture.path.name for picture in history.pictures()] == ["b.png", "c.png", "a.png"]
    assert history.pictures()[1].against_usual == pytest.approx(1.0)


def test_losses_by_timestep_are_kept_for_each_quarter_of_the_run():
    history = RunHistory(total_steps=8)
    history.look([record(step, (A, 0.35, float(step))) for step in range(1, 9)])
    history.look([record(8, (A, 0.35, math.nan))])
    assert [part[3].mean for part in history.by_run_part] == [1.5, 3.5, 5.5, 7.5]
    assert math.isnan(history.by_run_part[0][4].mean)


def test_sample_pictures_are_made_small_and_the_given_ones_left_as_they_are():
    history, picture = RunHistory(total_steps=8), Image.new("RGBA", (1024, 512))
    history.log_image("sample/00", picture, 3)
    assert history.samples["sample/00"][3].size == (256, 128)
    assert picture.size == (1024, 512)
