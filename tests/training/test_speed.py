"""How modules are compiled."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from library.training.speed import compile_modules


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
