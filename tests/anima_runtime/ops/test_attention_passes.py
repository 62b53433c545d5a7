"""Attention's two passes against autograd of softmax(q kᵀ) v, with keys of zeros that are there."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.anima_runtime.attention import attend
from library.anima_runtime.ops.attention_passes import (
    attend_backward,
    attend_forward,
    attend_normed_forward,
    norms_heads,
)

HEADS, SIZE = 2, 16


def own_attention(q, k, v):
    """A package's function, as far as `attention_passes` can tell."""
    with sdpa_kernel(SDPBackend.MATH):
        return attend(q, k, v)


def expected(q, k, v, zeros, dout):
    """The result and its gradients by plain maths; zeros stand behind the keys and values."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    nothing = k.new_zeros(len(k), zeros, *k.shape[2:])
    keys, values = (torch.cat([x, nothing], dim=1) for x in leaves[1:])
    logits = torch.einsum("blhd,bshd->bhls", leaves[0], keys) / q.shape[3] ** 0.5
    out = torch.einsum("bhls,bshd->blhd", logits.softmax(-1), values).flatten(2)
    return out, torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("function", [attend, own_attention], ids=["torch's", "a package's"])
@pytest.mark.parametrize("zeros", [0, 1, 500])
@pytest.mark.parametrize(("length", "keys"), [(24, 3), (6, 70), (25, 3)], ids=["8 parts", "2 parts", "1 part"])
def test_result_and_gradients_are_those_of_all_keys(function, zeros, length, keys):
    generator = torch.Generator().manual_seed(0)
    draw = lambda rows: torch.randn(2, rows, HEADS, SIZE, generator=generator, dtype=torch.float64)  # noqa: E731
    # Large logits too, either way: exponentials of them alone would overflow or vanish.
    q, k, v, dout = 30 * draw(length), draw(keys), draw(keys), draw(length).flatten(2)
    out, gradients = expected(q, k, v, zeros, dout)
    attended = attend_forward(function, q, k, v, zeros)
    assert attended.parts == {24: 8, 6: 2, 25: 1}[length]
    torch.testing.assert_close(attended.output, out, rtol=1e-9, atol=1e-12)
    for found, gradient in zip(attend_backward(attended, dout.flatten(0, 1)), gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_bf16_is_as_good_as_with_all_keys():
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, rows, HEADS, SIZE, generator=generator) for rows in (64, 8, 8, 64))
    out, gradients = expected(q, k, v, 100, dout.flatten(2))
    attended = attend_forward(attend, *(x.bfloat16() for x in (q, k, v)), 100)
    found = attended.output, *attend_backward(attended, dout.bfloat16().flatten(0, 1).flatten(1))
    for own, exact in zip(found, (out, *gradients), strict=True):
        assert (own.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
@pytest.mark.parametrize(("keys", "zeros"), [(128, 384), (100, 0), (256, 256), (640, 0)])
def test_each_kernel_of_a_card_gives_the_same(backend, keys, zeros):
    q, k, v, dout = drawn_on_the_card(keys)
    exact = expected(*(x.double() for x in (q, k, v)), zeros, dout.double().flatten(2))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        attended = attend_forward(attend, q, k, v, zeros)
        assert_near(attended, dout, *exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("length", "heads"), [(1024, 4), (1000, 16)])
@pytest.mark.parametrize(("keys", "zeros"), [(128, 384), (100, 0), (7, 1)])
def test_this_projects_kernels_norm_heads_and_give_the_same(length, heads, keys, zeros):
    """q, k and v are columns of wider matrices, as joint products give them."""
    q, k, v, dout = drawn_on_the_card(keys, length, heads)
    q, k, v = (F.pad(x.flatten(2), (0, 8))[..., :-8].unflatten(2, (heads, 128)) for x in (q, k, v))
    if not norms_heads(attend, q, k):
        pytest.skip("this card lacks the shared memory")
    weights = tuple(torch.linspace(*ends, 128, device="cuda") for ends in ((0.5, 2.0), (1.5, 0.5)))
    normed = (F.rms_norm(x.double(), (128,), own.double(), 1e-6) for x, own in zip((q, k), weights, strict=True))
    exact = expected(*normed, v.double(), zeros, dout.double().flatten(2))
    assert_near(attend_normed_forward(q, k, v, weights, zeros), dout, *exact)


def drawn_on_the_card(keys, length=1024, heads=4):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda rows: torch.randn(2, rows, heads, 128, generator=generator, device="cuda").bfloat16()  # noqa: E731
    return draw(length), draw(keys), draw(keys), draw(length)


def assert_near(attended, dout, out, gradients):
    found = attended.output, *attend_backward(attended, dout.flatten(0, 1).flatten(1))
    for own, exact in zip(found, (out, *gradients), strict=True):
        assert (own.double() - exact).norm() < 0.01 * exact.norm()
