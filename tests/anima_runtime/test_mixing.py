"""Mixing against einsum and autograd, and its kernels in Triton's interpreter."""

import pytest
import torch

from library.anima_runtime import mixing

MEMBERS, COUNT, WIDTH = 3, 37, 96


@pytest.fixture
def draw():
    """draw(3, 4): normally distributed float64 numbers, other ones at each call."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def kernels(monkeypatch):
    """`mixing_kernels` in Triton's interpreter, cut up as large inputs are: several tiles a row and a program."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a card")
    from library.anima_runtime import mixing_kernels

    for launch in (mixing_kernels.MIX_LAUNCH, mixing_kernels.BACKWARD_LAUNCH):
        monkeypatch.setitem(launch, "PROGRAMS", 9)
        monkeypatch.setitem(launch, "COLUMNS", 64)
    return mixing_kernels


def side_by_side(x_MNIK):
    """The same numbers as a view in which members lie between a row's parts, and rows are apart."""
    members, count, parts, width = x_MNIK.shape
    room = torch.full((count, parts, members + 1, width), torch.nan, dtype=x_MNIK.dtype)
    view = room[:, :, :members].permute(2, 0, 1, 3)
    view.copy_(x_MNIK)
    return view


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (2, 8), (32, 64), (1, 2)])
@pytest.mark.parametrize(("ops", "dtype", "bound"), [("plain", torch.float64, 1e-12), ("kernels", torch.float32, 1e-5)])
@pytest.mark.parametrize("again", [True, False])
def test_mixing_is_einsum_with_autograds_gradients(draw, request, shape, ops, dtype, bound, again):
    o, i = shape
    w, x = draw(MEMBERS, o, i).requires_grad_(), draw(MEMBERS, COUNT, i, WIDTH).requires_grad_()
    dout = draw(MEMBERS, COUNT, o, WIDTH)
    expected = torch.einsum("moi,mnik->mnok", w, x)
    dw, dx = torch.autograd.grad((expected * dout).sum(), (w, x))
    ops = mixing if ops == "plain" else request.getfixturevalue("kernels")
    inputs = [tensor.detach().to(dtype) for tensor in (w, dout, x)]
    out, second = (side_by_side(torch.full_like(inputs[1], torch.nan)) for _ in range(2))
    found_dx = side_by_side(torch.full_like(inputs[2], torch.nan))
    ops.mix(inputs[0], side_by_side(inputs[2]), out)
    found_dw = ops.mix_backward(
        inputs[0], side_by_side(inputs[1]), side_by_side(inputs[2]), found_dx, second if again else None
    )
    pairs = [(out, expected), (found_dx, dx), (found_dw, dw), *([(second, expected)] if again else [])]
    for found, wanted in pairs:
        assert (found - wanted).norm() <= bound * wanted.norm()


def test_sides_that_matrix_units_cannot_take_are_left_to_torch(draw, kernels):
    assert kernels.mixes(draw(1, 8, 16))
    assert not any(kernels.mixes(draw(1, *shape)) for shape in ((8, 17), (128, 8), (64, 1)))


def test_float32_sums_of_bf16_gradients(draw):
    dout, x = draw(1, 5, 8, 32).bfloat16(), draw(1, 5, 8, 32).bfloat16()
    dw = mixing.mix_backward(draw(1, 8, 8).bfloat16(), dout, x, torch.empty_like(x))
    assert dw.dtype == torch.float32
