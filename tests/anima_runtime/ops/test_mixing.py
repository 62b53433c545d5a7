"""Merging against dense Kronecker products, mixing against einsum, and the kernels in Triton's interpreter."""

import pytest
import torch

from library.anima_runtime.ops import mixing

MEMBERS, COUNT, WIDTH = 3, 37, 96


@pytest.fixture
def kernels(interpreter, monkeypatch):
    """`mixing_kernels` in Triton's interpreter, cut up as large inputs are: several tiles a row and a program."""
    from library.anima_runtime.ops import mixing_kernels

    for name, value in (("PROGRAMS", 9), ("COLUMNS", 64)):
        monkeypatch.setitem(mixing_kernels.MIX_LAUNCH, name, value)
    return mixing_kernels


def side_by_side(x_MNIK):
    """The same numbers as a view in which members lie between a row's parts, and rows are apart."""
    members, count, parts, width = x_MNIK.shape
    room = torch.full((count, parts, members + 1, width), torch.nan, dtype=x_MNIK.dtype)
    view = room[:, :, :members].permute(2, 0, 1, 3)
    view.copy_(x_MNIK)
    return view


EACH = pytest.mark.parametrize(
    ("ops", "dtype", "bound"), [("plain", torch.float64, 1e-12), ("kernels", torch.float32, 1e-5)]
)


@pytest.mark.parametrize("sides", [(8, 8), (4, 16), (16, 8), (32, 64), (1, 2)])
@pytest.mark.parametrize("turned", [False, True])
@EACH
def test_mixing_is_einsum_with_autograds_gradient(draw, request, sides, turned, ops, dtype, bound):
    p, q = sides
    v, a, b = draw(MEMBERS, p, q).requires_grad_(), draw(MEMBERS, COUNT, p, WIDTH), draw(MEMBERS, COUNT, q, WIDTH)
    expected = torch.einsum("mpq,mnqj->mnpj", v, b)
    (dv,) = torch.autograd.grad((expected * a).sum(), v)
    ops = mixing if ops == "plain" else request.getfixturevalue("kernels")
    v = v.detach().to(dtype)
    v = v.transpose(1, 2).contiguous().transpose(1, 2) if turned else v
    mixed = side_by_side(torch.full_like(a, torch.nan, dtype=dtype))
    found = ops.mix(v, side_by_side(a.to(dtype)), side_by_side(b.to(dtype)), mixed)
    for ours, theirs in ((mixed, expected), (found, dv)):
        assert (ours - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize(("small", "large"), [((8, 8), (16, 32)), ((3, 2), (7, 80))])
@EACH
def test_merging_adds_dense_kronecker_products(draw, request, small, large, ops, dtype, bound):
    w1, w2 = draw(2, *small), draw(2, *large)
    weight = draw(2 * small[0] * large[0], small[1] * large[1])
    ops, out = mixing if ops == "plain" else request.getfixturevalue("kernels"), torch.empty_like(weight, dtype=dtype)
    ops.merge(weight.to(dtype), w1.to(dtype), w2.to(dtype), out)
    expected = weight + torch.cat([torch.kron(*pair) for pair in zip(w1, w2, strict=True)])
    assert (out - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("ops", ["plain", "kernels"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_bf16_weights_are_rounded_up_as_often_as_what_is_added_is_of_their_last_digit(request, ops, share):
    ops = mixing if ops == "plain" else request.getfixturevalue("kernels")
    weight, step = torch.ones(64, 256).bfloat16(), 2**-7
    w1, w2 = torch.full((1, 4, 8), share).bfloat16(), torch.full((1, 16, 32), step).bfloat16()
    out, again = torch.empty_like(weight), torch.empty_like(weight)
    for each in (out, again):
        ops.merge(weight, w1, w2, each)
    assert set(out.unique().tolist()) <= {1.0, 1 + step}
    for part in (out, out[:8], out[:, :32]):
        assert ((part.double() - 1) / step).mean().item() == pytest.approx(share, abs=0.02)
    assert torch.equal(out, again)


def test_kernels_round_as_the_plain_formula_does(draw, kernels):
    weight, w1, w2 = draw(64, 256).bfloat16(), draw(1, 4, 8).bfloat16(), draw(1, 16, 32).bfloat16()
    weight[3, 5] = torch.nan
    found = [torch.empty_like(weight) for _ in range(2)]
    for ops, out in zip((mixing, kernels), found, strict=True):
        ops.merge(weight, w1, w2, out)
    assert torch.equal(*(out.nan_to_num(7.0) for out in found)) and found[0].isnan().sum() == 1


def test_sides_that_matrix_units_cannot_take_are_left_to_torch(draw, kernels):
    assert kernels.mixes(draw(1, 8, 16))
    assert not any(kernels.mixes(draw(1, *sides)) for sides in ((8, 17), (128, 8), (64, 1)))


def test_gradients_of_bf16_are_float32(draw):
    v, a, b = draw(1, 8, 4).bfloat16(), draw(1, 5, 8, 16).bfloat16(), draw(1, 5, 4, 16).bfloat16()
    assert mixing.mix(v, a, b, torch.empty_like(a)).dtype == torch.float32
