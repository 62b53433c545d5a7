"""Weights in one memory, whichever way they are kept."""

import pytest
import torch
from torch import nn

from library.anima_runtime.memory.float8 import quantise
from library.anima_runtime.memory.weight_swap import SwappedBlock, WeightSwap
from networks.fused.joined_weights import LastingWeights, WrittenWeights, joined_weights


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("ranks", [0, 3])
def test_all_lie_where_they_should_and_linears_go_on(eight_bits, swaps, ranks):
    torch.manual_seed(0)
    linears = [nn.Linear(5, width).requires_grad_(False) for width in (4, 2)]
    if eight_bits:
        for linear in linears:
            quantise(linear)
    x = torch.randn(7, 5)
    before, exact = [linear(x) for linear in linears], torch.cat([linear.weight.float() for linear in linears])
    if eight_bits:
        exact *= torch.cat([linear.scale_O1 for linear in linears])
    swapped = SwappedBlock(WeightSwap(1, torch.device("cpu")), 0) if swaps else None
    weights = joined_weights(linears, ranks, swapped)
    assert isinstance(weights, WrittenWeights if eight_bits or swaps else LastingWeights)
    weights.up_OR.copy_(torch.randn(6, ranks))
    weights.down_RI.copy_(torch.randn(ranks, 5))
    if swaps:
        swapped.swap.begin()
    whole = weights.whole()
    assert whole.shape == (6 + ranks, 5 + ranks) and whole.dtype == torch.float32
    torch.testing.assert_close(whole[:6, :5], exact, rtol=1e-6, atol=0.0)
    assert torch.equal(whole[:6, 5:], weights.up_OR) and torch.equal(whole[6:, :5], weights.down_RI)
    for linear, expected in zip(linears, before, strict=True):
        assert torch.equal(linear(x), expected)
