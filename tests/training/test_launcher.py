"""What ends the launcher reaches the trainer, in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import signal, sys, time
from pathlib import Path
from library.training.launcher import end_with_launcher

folder = Path(sys.argv[1])
def handle(number, frame):
    (folder / "told").write_text(str(number))
    sys.exit(0)

signal.signal(signal.SIGUSR1, handle)
(folder / "ready").write_text(str(end_with_launcher()))
time.sleep(60)
(folder / "forgotten").touch()
"""


def wait_for(path: Path, seconds: float) -> str:
    for _ in range(int(seconds * 20)):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    pytest.fail(f"{path.name} did not appear")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_accelerate_launch_reaches_the_trainer(tmp_path, number):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes=1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([*command, str(tmp_path / "script.py"), str(tmp_path)], env=environment)
    try:
        assert wait_for(tmp_path / "ready", 60) == "True"
        launcher.send_signal(number)
        assert wait_for(tmp_path / "told", 10) == str(int(signal.SIGUSR1))
    finally:
        launcher.kill()
        launcher.wait()


def test_a_trainer_started_by_hand_is_left_alone(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.replace("time.sleep(60)", "sys.exit(0)"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, str(tmp_path / "script.py"), str(tmp_path)], env=environment, check=True)
    assert (tmp_path / "ready").read_text() == "False"
