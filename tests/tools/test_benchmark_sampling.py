"""The benchmark renders through the trainer's own sampling, whichever way the model is called."""

import json

import pytest

from tools.benchmark_sampling import CASES, main


def test_each_case_gives_a_line_and_the_same_picture(capsys):
    assert main(["--tiny", "--pictures", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["case"] for line in lines] == list(CASES)
    for line in lines:
        assert line["ms_per_forward"] > 0
        assert line["distance"] < 1e-4


def test_an_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["lora_2048"])
    assert "lora_2048" in capsys.readouterr().err
