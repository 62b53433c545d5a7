"""Whole runs under the launchers that users start them with, stopped as terminals and job systems do it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A run whose steps take longer than the launcher needs to end.
SCRIPT = """
import sys, time
from anima_train_network import AnimaNetworkTrainer, main
step = AnimaNetworkTrainer.step
def slow(self, *arguments):
    time.sleep(3)
    return step(self, *arguments)
AnimaNetworkTrainer.step = slow
sys.exit(main(sys.argv[1:]))
"""
ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes=1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def hear_hang_ups():
    """As in a terminal, also where the tests themselves run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for(text: str, log: Path, seconds: float) -> str:
    """What the run has said when it has said that."""
    deadline = time.monotonic() + seconds
    while text not in (said := log.read_text(encoding="utf-8", errors="replace")):
        assert time.monotonic() < deadline, f"the run did not say {text!r} in time:\n{said}"
        time.sleep(0.05)
    return said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize(
    ("launcher", "number", "to_all"),
    [
        pytest.param(ACCELERATE, signal.SIGTERM, False, id="a job system ends accelerate"),
        pytest.param(ACCELERATE, signal.SIGINT, True, id="Ctrl+C under accelerate"),
        pytest.param(ACCELERATE, signal.SIGHUP, True, id="the terminal of accelerate closes"),
        pytest.param(TORCHRUN, signal.SIGINT, True, id="Ctrl+C under torchrun"),
    ],
)
def test_a_run_that_is_stopped_once_saves_and_says_how_to_go_on(config, tmp_path, launcher, number, to_all):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    words = [*launcher, str(tmp_path / "script.py"), *config(max_train_steps=40, train_batch_size=1)]
    log = tmp_path / "log"
    with log.open("w") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            words, env=environment, stdout=file, stderr=file, start_new_session=True, preexec_fn=hear_hang_ups
        )
    try:
        wait_for("training 40 steps", log, 120)
        time.sleep(1)
        if to_all:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said = wait_for("go on with --resume", log, 60)
        (state,) = re.findall(r'stopped at step \d+ of 40; go on with --resume "(.*)"', said)
        assert (Path(state) / "run_state.json").is_file()
        assert "stopped at once" not in said
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
