"""The benchmark of what a run does beside its steps goes through the trainer's whole loop."""

from __future__ import annotations

import json

import pytest

from tools.benchmark_running import main


def test_two_lines_of_numbers_and_the_saves_that_were_timed(tmp_path, capsys):
    words = ["--tiny", "--steps", "8", "--rounds", "2", "--folder", str(tmp_path)]
    assert main(words) == 0
    watching, saving = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert (watching["what"], saving["what"]) == ("watching", "saving")
    assert len(watching["off_ms"]) == len(watching["on_ms"]) == len(saving["call_ms"]) == 2
    assert all(number > 0 for name in ("off_ms", "on_ms") for number in watching[name])
    assert saving["cost_steps"] == pytest.approx(saving["cost_ms"] / saving["step_ms"], rel=0.05, abs=0.01)
    saved = {path.name for path in (tmp_path / "output").iterdir()}
    assert {"anima_lora-step00000100-state", "anima_lora-step00000100.safetensors"} <= saved
    runs = list((tmp_path / "logs").glob("*/progress.jsonl"))
    assert len(runs) == 4  # those that watch
    for run in runs:
        logged = [json.loads(line) for line in run.read_text(encoding="utf-8").splitlines()]
        steps = [line["step"] for line in logged if line["event"] == "log"]
        assert steps == [100, 104]
