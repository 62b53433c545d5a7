"""Weights of 8 bits against plain maths."""

import pytest
import torch
from torch import nn

from library.anima_runtime.memory.float8 import Float8Linear, quantise


def quantised(linear: nn.Linear) -> tuple[Float8Linear, torch.Tensor]:
    """The Linear, and its weights as they are now, exactly."""
    quantise(linear)
    return linear, linear.weight.double() * linear.scale_O1.double()


def test_weights_are_rounded_to_the_nearest_by_row():
    torch.manual_seed(0)
    linear = nn.Linear(24, 16)
    weight = linear.weight.detach().double()
    linear, kept = quantised(linear)
    assert isinstance(linear, Float8Linear) and linear.weight.dtype == torch.float8_e4m3fn
    # e4m3 has 3 bits after the leading one: half a unit in the last place is 1/16 of the value, less for small ones.
    assert ((kept - weight).abs() <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) / 448 / 512).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_equal_plain_maths(dtype, tolerance, bias):
    """bfloat16 rounds weight and result: each by at most 2⁻⁹ = 0.002 of itself."""
    torch.manual_seed(0)
    linear, kept_OI = quantised(nn.Linear(24, 16, bias=bias, dtype=dtype))
    x, dout = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True), torch.randn(2, 5, 16, dtype=dtype)
    output = linear(x)
    output.backward(dout)
    assert output.dtype == x.grad.dtype == dtype
    expected = x.double() @ kept_OI.t() + (linear.bias.double() if bias else 0.0)
    for value, exact in [(output, expected), (x.grad, dout.double() @ kept_OI)]:
        assert value.shape == exact.shape
        assert (value.double() - exact).norm() <= tolerance * exact.norm()
