import json
import math

import pytest
import torch

from library.training.watching.progress import Pace, ProgressFile, closing_line


def test_pace_is_that_since_the_first_log_point_of_the_last_twenty():
    times = iter([100.0, 104.0, 110.0])
    pace = Pace(total_steps=20, clock=lambda: next(times))
    assert pace.values(1) == {} and pace.seconds_per_step is None
    assert pace.values(3) == {"time/seconds_per_step": 2.0, "time/seconds_left": 34.0}
    assert pace.values(3) == {}
    assert pace.values(5) == {"time/seconds_per_step": 2.5, "time/seconds_left": 37.5}
    assert pace.seconds_per_step == 2.5


def test_the_closing_line_tells_the_speed_where_it_is_known():
    cpu = torch.device("cpu")
    assert closing_line(7, 0.03081, cpu) == "trained up to step 7, 0.0308 s a step"
    assert closing_line(1, None, cpu) == "trained up to step 1"


def test_pace_forgets_what_lies_more_than_twenty_log_points_back():
    now = {step: 10.0 * step if step <= 20 else 200.0 + (step - 20) for step in range(1, 41)}
    pace = Pace(total_steps=40)
    for step, seconds in now.items():
        pace._clock = lambda seconds=seconds: seconds
        values = pace.values(step)
    assert values == {"time/seconds_per_step": pytest.approx(1.0), "time/seconds_left": 0.0}


def test_each_log_point_and_event_is_a_line_that_can_be_read_at_once(tmp_path):
    file = ProgressFile(tmp_path / "run", total_steps=9)
    file.log({"loss/current": 0.5, "lr/unet": 1e-4}, 1)
    file.log({"loss/current": math.nan, "norm/gradient": math.inf}, 2)
    file.event("save", 2, "tiny-step00000002.safetensors → 完")
    lines = (tmp_path / "run" / "progress.jsonl").read_text(encoding="utf-8").splitlines()
    file.close()

    read = [json.loads(line) for line in lines]
    times = [line.pop("time") for line in read]
    assert times == sorted(times)
    assert read == [
        {"event": "log", "step": 1, "total_steps": 9, "loss/current": 0.5, "lr/unet": 1e-4},
        {"event": "log", "step": 2, "total_steps": 9, "loss/current": None, "norm/gradient": None},
        {"event": "save", "step": 2, "total_steps": 9, "text": "tiny-step00000002.safetensors → 完"},
    ]
