"""The picture of timesteps shows those that are drawn."""

import pytest

from library.anima_runtime.objective import timestep_plot
from library.anima_runtime.objective.timestep_plot import save_timestep_histogram
from library.anima_runtime.objective.timesteps import TimestepSettings, draw_timestep

KEYS = [(0, f"{number}.png", 0) for number in range(300)]


def test_the_picture_holds_what_the_run_will_draw(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(timestep_plot, "save_histogram", lambda path, title, x_label, values: drawn.update(v=values))
    settings = TimestepSettings(timestep_sampling="flux_shift")
    samples = [(key, (512, 768), 50 if key[1] == "7.png" else 0) for key in KEYS]
    save_timestep_histogram(tmp_path / "t.png", samples, 3, settings)
    assert drawn["v"][8] == draw_timestep(KEYS[8], 3, settings, (512, 768))
    assert drawn["v"][7] == draw_timestep(KEYS[7], 3, settings, (512, 768), 50)
    assert len(drawn["v"]) == 300


def test_the_file_is_a_picture_and_the_log_names_it(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "t.png"
    save_timestep_histogram(path, ((key, (64, 64), 0) for key in KEYS), 1, TimestepSettings())
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "Timesteps of 300 samples, 0.7" in caplog.text and str(path) in caplog.text
    # the mean of a logit-normal shifted by 3 is 0.714; 300 samples have a standard error of 0.010
    mean = float(caplog.text.split("samples, ")[1].split()[0])
    assert mean == pytest.approx(0.714, abs=0.04)
