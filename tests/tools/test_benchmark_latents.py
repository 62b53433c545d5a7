"""The benchmark caches latents through the trainer's own means, and they are those of diffusers' VAE."""

import json

from tools.benchmark_latents import main


def test_each_way_gives_a_line(capsys):
    assert main(["--tiny", "--side", "64", "--pictures", "5"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    lines = {line["case"]: line for line in found}
    assert lines["encode"]["distance"] < 1e-5
    for case in ("plain_loop", "trainer_batch1", "trainer_batch4"):
        assert lines[case]["pictures_per_second"] > 0
