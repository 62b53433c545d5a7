"""What one process makes of an exchange that fails; tests/test_two_processes.py has several of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from library.errors import UserError
from library.training.processes import sum_over_processes


@pytest.mark.parametrize(
    ("device", "fails_on", "error", "message"),
    [
        ("cpu", "cpu", UserError, "another process of this run has ended"),
        ("meta", "cpu", UserError, "another process of this run has ended"),
        ("meta", "meta", RuntimeError, "Duplicate GPU detected"),
    ],
)
def test_only_a_failure_in_main_memory_means_that_a_process_has_ended(device, fails_on, error, message, monkeypatch):
    """meta stands for a GPU, before whose exchange all processes have agreed in main memory that they are there."""

    def all_reduce(tensor):
        if tensor.device.type == fails_on:
            raise RuntimeError("Connection closed by peer" if fails_on == "cpu" else "Duplicate GPU detected")

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    with pytest.raises(error, match=message):
        sum_over_processes([torch.zeros(2, device=device)])


# What a run imports late keeps the group that there is by then, unless it was imported before.
SCRIPT = """
from pathlib import Path
from torch import distributed
from library.training.processes import join_group, wait_for_all
join_group()
wait_for_all()
import torch._dynamo
distributed.destroy_process_group()
print(*(thread.joinpath("comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc")
def test_no_thread_of_a_group_outlives_it():
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {**os.environ, **alone, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    assert "gloo" not in run.stdout and run.stdout.strip()
