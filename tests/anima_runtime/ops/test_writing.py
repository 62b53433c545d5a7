"""Weights written out, by the kernel in Triton's interpreter and without it, against plain maths."""

import pytest
import torch

from library.anima_runtime.ops.writing import write_out


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
    from library.anima_runtime.ops.writing_kernels import write_out as by_kernel

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
