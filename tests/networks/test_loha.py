"""LoHa's maths against LyCORIS and dense products."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks.adapter import Dropouts
from networks.loha import SUFFIXES, LoHa


def randomised(dropouts=Dropouts()) -> LoHa:
    torch.manual_seed(0)
    adapter = LoHa(24, 40, 3, 2.0, dropouts)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def test_delta_equals_lycoris():
    from lycoris.functional.loha import diff_weight

    adapter = randomised()
    w1_a, w1_b, w2_a, w2_b = (getattr(adapter, suffix) for suffix in SUFFIXES)
    expected = diff_weight(w1_b, w1_a, w2_b, w2_a, None, None, gamma=torch.tensor(2.0 / 3))
    torch.testing.assert_close(adapter.delta_weight(), expected, rtol=1e-5, atol=1e-5)


def test_forward_adds_the_delta_and_a_new_adapter_adds_nothing():
    adapter = randomised()
    x, base = torch.randn(2, 5, 24), torch.randn(2, 5, 40)
    torch.testing.assert_close(adapter(x, base), base + x @ adapter.delta_weight().T, rtol=1e-4, atol=1e-4)
    assert torch.equal(LoHa(24, 40, 3, 2.0)(x, base), base)


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24)])
def test_gradients_equal_those_of_the_dense_delta_in_float64(shape):
    adapter = randomised().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    base = torch.randn(*shape[:-1], 40, dtype=torch.float64)
    inputs, seed = [x, *adapter.parameters()], torch.randn_like(base)
    ours = torch.autograd.grad(adapter(x, base), inputs, seed)
    w1_a, w1_b, w2_a, w2_b = (getattr(adapter, suffix) for suffix in SUFFIXES)
    dense = base + F.linear(x, 2.0 / 3 * (w1_a @ w1_b) * (w2_a @ w2_b))
    for gradient, expected in zip(ours, torch.autograd.grad(dense, inputs, seed), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_dropouts_act_in_training_only():
    adapter = randomised(Dropouts(rank=0.5))
    x, base = torch.randn(200, 24), torch.zeros(200, 40)
    zero = (adapter(x, base) == 0).all(dim=0)
    assert 5 < zero.sum() < 35
    torch.testing.assert_close(adapter.eval()(x, base), x @ adapter.delta_weight().T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_and_gradients_stay_float32(dtype):
    adapter = randomised()
    output = adapter(torch.randn(4, 24, dtype=dtype), torch.randn(4, 40, dtype=dtype))
    output.float().square().mean().backward()
    assert output.dtype == dtype
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


def test_the_delta_can_be_limited():
    adapter = randomised()
    adapter.limit_norm(0.5)
    assert adapter.delta_weight().norm().item() == pytest.approx(0.5, rel=1e-5)
