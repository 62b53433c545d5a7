"""The kernel of LoRA's gradients, in Triton's interpreter, against plain products."""

import pytest
import torch


@pytest.fixture
def kernels(interpreter, monkeypatch):
    """The module, with several turns for few rows."""
    from library.anima_runtime.ops import low_rank_kernels

    for launch in (low_rank_kernels.THIN_LAUNCH, low_rank_kernels.FEW_LAUNCH):
        monkeypatch.setitem(launch, "ROWS", 16)
    return low_rank_kernels


@pytest.mark.parametrize("count", [32, 37], ids=["even", "odd"])
@pytest.mark.parametrize(("linears", "rank"), [(1, 16), (2, 16), (3, 16), (1, 64)])
def test_gradients_of_each_linear_are_plain_products(kernels, count, linears, rank):
    """All matrices have other columns between their rows, as in joint rooms."""
    generator = torch.Generator().manual_seed(0)
    widths = linears * 128, linears * rank, 192, linears * rank
    dy, hidden, x, dhidden = (
        torch.cat([torch.randn(count, width, generator=generator), torch.full((count, 8), torch.nan)], dim=1)[:, :width]
        for width in widths
    )
    dup, ddown = kernels.factor_gradients(dy, hidden, x, dhidden, linears)
    expected = [
        own.double().t() @ h.double() for own, h in zip(dy.split(128, dim=1), hidden.split(rank, dim=1), strict=True)
    ]
    torch.testing.assert_close(dup.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ddown.double(), dhidden.double().t() @ x.double(), rtol=1e-5, atol=1e-5)


def test_it_is_for_ranks_and_widths_that_fill_tiles(kernels):
    assert kernels.suits(2048, 8192, 16, linears=3)
    assert not kernels.suits(2048, 8192, 32, linears=3)
    assert not kernels.suits(2048, 8192, 48, linears=1)
    assert not kernels.suits(96, 8192, 16, linears=1)
