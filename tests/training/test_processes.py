"""What one process makes of an exchange that fails; tests/test_two_processes.py has several of them."""

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
