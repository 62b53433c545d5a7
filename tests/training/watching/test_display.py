import io

import pytest
from rich.console import Console

from library import console
from library.training.watching import display
from library.training.watching.display import RunDisplay

VALUES = {
    "loss/current": 0.12345, "loss/average": 0.2, "lr/unet": 1e-4, "lr/norm": 1e-4, "time/seconds_per_step": 0.25,
    "time/seconds_left": 7200.0, "gpu/mem_peak_allocated_mb": 6554.0,
}  # fmt: skip
NUMBERS = "loss 0.1235, average 0.2000, 0.25 s a step, peak memory 6554 MiB, rate 0.0001, 2 h 0 min left"


@pytest.fixture
def clock(monkeypatch):
    """clock[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_for_the_last_step(capsys, clock):
    shown = RunDisplay(total_steps=100)
    for step in range(1, 101):
        clock[0] += 0.9
        shown.advance(step)
        shown.log(VALUES, step)
        shown.log({"loss/epoch_average": 0.5}, step)
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"step 1 of 100: {NUMBERS}"
    assert [int(line.split()[1]) for line in lines] == [1, 13, 25, 37, 49, 61, 73, 85, 97, 100]


def test_rates_that_differ_are_named(capsys):
    RunDisplay(total_steps=2).log({"loss/current": 1.0, "lr/unet": 1e-4, "lr/text_encoder": 1e-5}, 2)
    assert capsys.readouterr().err == "step 2 of 2: loss 1.0000, rate of unet 0.0001, rate of text_encoder 1e-05\n"


def test_a_terminal_shows_numbers_and_the_last_events(capsys):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    shown = RunDisplay(total_steps=4, console=terminal)
    for step in (1, 2):
        shown.advance(step)
        shown.log(VALUES, step)
    shown.event("save", 1, "tiny-000001.safetensors")
    shown.event("save", 2, "tiny-000002.safetensors")
    shown.event("alert", 2, "the loss is 9, where 1 is usual " + "x" * 200)
    shown.event("end", 2, "stopped")
    shown.close()
    last = terminal.file.getvalue().split("\r")[-1].split("step 2 of 4")[-1]
    assert " 50%" in last
    assert "\nrun stopped (step 2)" in last and "last end" not in last
    assert NUMBERS in last
    assert "last save: tiny-000002.safetensors (step 2)" in last
    assert "tiny-000001" not in last
    assert "last alert: the loss is 9" in last
    assert all(len(line) <= 100 for line in last.splitlines())
    assert capsys.readouterr().err == ""


def test_a_bar_without_a_terminal_tells_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress_bar(100, "reading pictures") as bar, console.progress_bar(9, "hidden", shown=False) as hidden:
        for _ in range(25):
            now[0] += 1
            bar.update(4)
            hidden.update()
    assert capsys.readouterr().err == "reading pictures: 40 of 100\nreading pictures: 80 of 100\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (101, "2 min"), (5900, "98 min"), (6100, "1 h 42 min")]
)
def test_times_are_readable(seconds, text):
    assert console.readable_time(seconds) == text
