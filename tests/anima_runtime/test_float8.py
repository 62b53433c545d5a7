"""Weights of 8 bits against plain maths, and the kernel that writes them out, in Triton's interpreter."""

import pytest
import torch
from torch import nn

from library.anima_runtime.float8 import Float8Linear, quantise, write_out


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


def every_weight(rows: int, columns: int) -> torch.Tensor:
    """All finite e4m3 numbers, again and again, in another order in each row."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(len(codes), generator=generator) for _ in range(rows)])
    return codes[order[:, :columns]].view(torch.float8_e4m3fn)


@pytest.mark.parametrize("ranks", [0, 16])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_weights_are_written_out_with_what_lies_beside_them(interpreter, ranks, eight_bits):
    """By the kernel, in tiles that do not fit, and without it."""
    from library.anima_runtime.float8_kernels import write_out as by_kernel

    weight_OI, generator = every_weight(13, 250), torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    scale_O1, beside = draw(13, 1).exp(), draw(13, 250 + ranks)
    if not eight_bits:
        weight_OI, scale_O1 = weight_OI.float(), None
    up_OR, down_RI = beside[:, 250:], draw(ranks, 250)
    expected = torch.zeros(13 + ranks, 250 + ranks, dtype=torch.float64)
    expected[:13, :250] = weight_OI.double() * (scale_O1.double() if eight_bits else 1.0)
    expected[:13, 250:], expected[13:, :250] = up_OR, down_RI
    whole = torch.full((13 + ranks, 250 + ranks), torch.nan)
    by_kernel(weight_OI, scale_O1, up_OR, down_RI, whole)
    for found in (whole, write_out(weight_OI, scale_O1, up_OR, down_RI)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0.0)
