"""How modules are compiled."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from library.training import speed
from library.training.speed import compile_modules, compile_obstacle, fuse_obstacle


class Squared(nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(float(offset)))

    def forward(self, x):
        return x * x + self.offset


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


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "capability", "triton", "expected"),
    [
        (torch.bfloat16, (8, 0), True, None),
        (torch.bfloat16, (7, 5), True, "older than Ampere"),
        (torch.float16, (9, 0), True, "not in bf16"),
        (torch.bfloat16, (8, 9), False, "Triton is not installed"),
    ],
    ids=["Ampere", "an old card", "fp16", "Windows without Triton"],
)
def test_own_kernels_need_bf16_a_card_for_it_and_triton(monkeypatch, dtype, capability, triton, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: object() if triton else None)
    found = fuse_obstacle(CUDA, dtype)
    assert found is None if expected is None else expected in found
    assert fuse_obstacle(torch.device("cpu"), dtype) == "there is no CUDA device"


def test_a_compiler_that_fails_is_an_obstacle_with_its_own_words(monkeypatch):
    def failing(function):
        def call(x):
            raise RuntimeError("Cannot find a working\n  triton installation")

        return call

    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    monkeypatch.setattr(torch, "compile", failing)
    assert compile_obstacle(CUDA) == "Cannot find a working triton installation"
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x)
    assert compile_obstacle(CUDA) is None
    assert compile_obstacle(torch.device("cpu")) == "there is no CUDA device"
