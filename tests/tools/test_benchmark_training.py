"""The benchmark runs its cases through the trainer's own step."""

import json
import sys

import pytest

from tools.benchmark_training import CASES, main


def test_each_case_gives_a_line_of_numbers(monkeypatch, capsys):
    words = ["lora", "lokr", "lora_checkpointing", "--tiny", "--steps", "2", "--warm_up", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark_training.py", *words])
    assert main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["case"] for line in lines] == words[:3]
    for line in lines:
        assert 0 < line["ms_min"] <= line["ms_median"] <= line["ms_max"]
        assert line["loss_last"] < line["loss_first"] * 1.5
    assert lines[0]["loss_first"] == pytest.approx(lines[2]["loss_first"], rel=1e-5)


def test_an_unknown_case_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_training.py", "lora_2048"])
    with pytest.raises(SystemExit) as stop:
        main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "lora_2048" in message and all(name in message for name in CASES)
