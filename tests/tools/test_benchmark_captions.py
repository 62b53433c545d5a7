"""The benchmark trains with captions through the trainer's own loader and caches."""

import json

import pytest

from tools.benchmark_captions import VARIANTS, main


def test_fixed_and_live_captions_give_lines_and_a_ratio(capsys):
    assert main(["--tiny", "--side", "64", "--pictures", "2"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    lines = {line["case"]: line for line in found}
    fixed, live = lines["captions_fixed"], lines["captions_live"]
    assert fixed["captions"] == [2, 2] and fixed["steps"] == live["steps"] == 40
    assert all(2 < count <= 2 * VARIANTS for count in live["captions"])
    ratio = live["ms_without_encoding"] / fixed["ms_without_encoding"]
    assert lines["captions_live_over_fixed"]["ms_without_encoding"] == pytest.approx(ratio, rel=1e-2)
