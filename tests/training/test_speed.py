"""What is chosen where nothing is set, and what is said when a wish cannot be fulfilled."""

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from library.training.speed import (
    STEPS_WORTH_COMPILING,
    SpeedSettings,
    chooses_compiling,
    chooses_fusing,
    chooses_graphs,
    compile_modules,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Squared(nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(float(offset)))

    def forward(self, x):
        return x * x + self.offset


@pytest.fixture
def compiler(monkeypatch):
    """compiler(reason): lets the trial of torch.compile find that obstacle, or none."""

    def set_obstacle(reason):
        monkeypatch.setattr("library.training.speed.compile_obstacle", lambda device: reason)

    return set_obstacle


@pytest.mark.parametrize(
    ("wish", "steps", "obstacle", "expected"),
    [
        (None, STEPS_WORTH_COMPILING, None, True),
        (None, STEPS_WORTH_COMPILING - 1, None, False),
        (None, 10_000, "Triton is missing", False),
        (True, 1, None, True),
        (True, 10_000, "Triton is missing", False),
        (False, 10_000, None, False),
    ],
)
def test_compiling_is_as_set_or_where_it_pays(compiler, caplog, wish, steps, obstacle, expected):
    compiler(obstacle)
    assert chooses_compiling(SpeedSettings(torch_compile=wish), CUDA, steps) is expected
    assert ("Triton is missing" in caplog.text) == (obstacle is not None)


@pytest.mark.parametrize("wish", [None, True])
def test_what_a_run_forbids_itself_is_told_where_compiling_was_asked_for(compiler, caplog, wish):
    compiler(None)
    assert not chooses_compiling(SpeedSettings(torch_compile=wish), CUDA, 10_000, "weights are swapped")
    assert ("weights are swapped" in caplog.text) == (wish is True)


def test_a_cpu_neither_compiles_nor_records_and_says_so_only_when_asked_to(caplog):
    caplog.set_level(logging.WARNING)
    assert not chooses_compiling(SpeedSettings(), CPU, 10_000)
    assert not chooses_graphs(SpeedSettings(), CPU, None)
    assert not caplog.text
    assert not chooses_compiling(SpeedSettings(torch_compile=True), CPU, 10_000)
    assert not chooses_graphs(SpeedSettings(cuda_graphs=True), CPU, None)
    assert "torch_compile" in caplog.text and "cuda_graphs" in caplog.text and "no CUDA device" in caplog.text


@pytest.mark.parametrize(
    ("wish", "obstacle", "expected"),
    [(None, None, True), (True, None, True), (False, None, False), (None, "fp16", False), (True, "fp16", False)],
)
def test_steps_are_recorded_on_cuda_unless_something_forbids_it(caplog, wish, obstacle, expected):
    assert chooses_graphs(SpeedSettings(cuda_graphs=wish), CUDA, obstacle) is expected
    assert ("fp16" in caplog.text) == (wish is True and obstacle is not None)


@pytest.mark.parametrize(
    ("wish", "machine", "run", "expected"),
    [
        (None, None, None, True),
        (True, None, None, True),
        (False, None, None, False),
        (None, "Triton is not installed", "it has dropout", False),
        (True, None, "it has dropout", False),
    ],
)
def test_blocks_are_fused_unless_the_machine_or_else_the_run_forbids_it(
    monkeypatch, caplog, wish, machine, run, expected
):
    monkeypatch.setattr("library.training.speed.fuse_obstacle", lambda device, dtype: machine)
    assert chooses_fusing(SpeedSettings(fused_blocks=wish), CUDA, torch.bfloat16, lambda: run) is expected
    assert [record.args[0] for record in caplog.records] == ([] if (machine or run) is None else [machine or run])


def test_a_cpu_says_that_it_does_not_fuse_only_when_asked_to(caplog):
    assert not chooses_fusing(SpeedSettings(), CPU, torch.bfloat16, lambda: None)
    assert not caplog.text
    assert not chooses_fusing(SpeedSettings(fused_blocks=True), CPU, torch.bfloat16, lambda: None)
    assert "there is no CUDA device" in caplog.text


@pytest.mark.parametrize(("shapes_vary", "forms"), [(False, 3), (True, 1)])
def test_modules_of_one_kind_share_a_form_for_each_shape_or_for_all(shapes_vary, forms):
    torch._dynamo.reset()
    counters.clear()
    modules = [Squared(number) for number in range(3)]
    compile_modules(modules, shapes_vary)
    for length in (5, 6, 7):
        for number, module in enumerate(modules):
            x = torch.full((1, length, 4), 3.0)
            if shapes_vary:
                torch._dynamo.maybe_mark_dynamic(x, 1)
            assert module(x).tolist() == torch.full((1, length, 4), 9.0 + number).tolist()
    assert counters["stats"]["unique_graphs"] == forms
