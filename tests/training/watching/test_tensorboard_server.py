import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from library.training.watching.tensorboard_server import TensorBoardServer
from library.training.watching.trackers import LoggingSettings, Tracker

ROOT = Path(__file__).parents[3]
PATIENCE = 60


def wait_for(condition):
    """What the condition gives when it first gives anything; the machine may be busy."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


def is_running(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return (Path("/proc") / str(process_id) / "stat").read_text().split()[2] != "Z"


def test_it_serves_at_the_next_free_port_until_the_run_ends(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        started = time.monotonic()
        server = TensorBoardServer(tmp_path, "127.0.0.1", port)
        assert time.monotonic() - started < 0.5
        (message,) = wait_for(lambda: caplog.messages)
    address = message.removeprefix("TensorBoard: ")
    assert int(address.rsplit(":", 1)[1].strip("/")) > port
    with urllib.request.urlopen(address, timeout=PATIENCE) as page:
        assert b"TensorBoard" in page.read()
    server.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address, timeout=PATIENCE)
    assert caplog.messages == [message]


def test_a_failure_to_start_is_told(tmp_path, caplog):
    server = TensorBoardServer(tmp_path, "256.0.0.1", 6006)
    (message,) = wait_for(lambda: caplog.messages)
    server.close()
    assert message.startswith("TensorBoard ended: ")
    assert message.endswith("; curves are still written to files")


def test_a_run_that_ends_at_once_tells_of_no_failure(tmp_path, caplog):
    """The address may have been told by then."""
    TensorBoardServer(tmp_path, "127.0.0.1", 6006).close()
    assert [message for message in caplog.messages if not message.startswith("TensorBoard: http")] == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes under /proc")
def test_it_ends_when_the_trainer_is_killed(tmp_path):
    program = (
        "import time; from pathlib import Path\n"
        "from library.training.watching.tensorboard_server import TensorBoardServer\n"
        f"server = TensorBoardServer(Path({str(tmp_path)!r}), '127.0.0.1', 6006)\n"
        "print(server._process.pid, flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    board = int(trainer.stdout.readline())
    assert is_running(board)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    wait_for(lambda: not is_running(board))


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, True),
        ({"log_with": "none"}, False),
        ({"auto_start_tensorboard": False}, False),
    ],
)
def test_a_tracker_starts_it_for_its_curves(settings, shown, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        "library.training.watching.trackers.TensorBoardServer", lambda *arguments: started.append(arguments)
    )
    settings = LoggingSettings(logging_dir=tmp_path, tensorboard_port=7000, **settings)
    assert Tracker(settings, "tiny", 2, {}, is_main_process=False).folder is None
    assert started == []
    Tracker(settings, "tiny", 2, {}, is_main_process=True)
    assert started == ([(tmp_path, "127.0.0.1", 7000)] if shown else [])
