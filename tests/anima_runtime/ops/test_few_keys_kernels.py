"""The kernels of attention to few keys, in Triton's interpreter, against autograd of the plain formula."""

from unittest.mock import MagicMock, Mock

import pytest
import torch
import torch.nn.functional as F

HEADS, SIZE = 3, 32


@pytest.fixture
def kernels(interpreter, monkeypatch):
    """The module, with several programs and turns for few rows."""
    from library.anima_runtime.ops import few_keys_kernels

    monkeypatch.setitem(few_keys_kernels.FORWARD_LAUNCH, "ROWS", 16)
    monkeypatch.setitem(few_keys_kernels.BACKWARD_LAUNCH, "ROWS", 16)
    monkeypatch.setattr(few_keys_kernels, "PROGRAMS", 2 * 2 * HEADS)
    return few_keys_kernels


def apart(x):
    """The same with others' columns between its rows, as in a joint product's result."""
    wide = torch.cat([x.flatten(2), torch.full_like(x.flatten(2)[..., :5], torch.nan)], dim=2)
    return wide[..., : HEADS * SIZE].unflatten(2, (HEADS, SIZE))


@pytest.mark.parametrize("zeros", [0, 1, 400])
@pytest.mark.parametrize(("length", "keys"), [(70, 16), (33, 21), (20, 3)])
@pytest.mark.parametrize("shift", [0.0, -120.0], ids=["", "far below 0"])
def test_result_and_gradients_are_those_of_all_keys(kernels, zeros, length, keys, shift):
    """shift: of the logits of all keys that are not zero, whose exponentials alone vanish."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda rows: torch.randn(2, rows, HEADS, SIZE, generator=generator)  # noqa: E731
    q, k, v, dout = draw(length), draw(keys), draw(keys), draw(length).flatten(2)
    weights = [torch.rand(SIZE, generator=generator) + low for low in (3.0, 0.5)]
    if shift:  # one number is most of each head: normed it is ±5.6
        q[..., 0], k[..., 0], weights[0][0] = -50.0, 50.0, -shift * SIZE**0.5 / 32 / weights[1][0]
    normed = [F.rms_norm(x.double(), (SIZE,), own.double(), 1e-6) for x, own in zip((q, k), weights, strict=True)]
    leaves = [x.requires_grad_() for x in (*normed, v.double())]
    all_keys, all_values = (torch.cat([x, x.new_zeros(2, zeros, HEADS, SIZE)], dim=1) for x in leaves[1:])
    logits = torch.einsum("blhd,bshd->bhls", leaves[0], all_keys) / SIZE**0.5
    if shift:
        assert logits[..., :keys].max() < 0.8 * shift
    out = torch.einsum("bhls,bshd->blhd", logits.softmax(-1), all_values).flatten(2)
    expected = torch.autograd.grad(out, leaves, dout.double())
    inputs = q, apart(k), apart(v), weights
    result, lse = kernels.attend_few_keys(*inputs, zeros)
    torch.testing.assert_close(result.double(), out, rtol=1e-4, atol=1e-4)
    for found, gradient in zip(kernels.attend_few_keys_backward(*inputs, lse, dout), expected, strict=True):
        torch.testing.assert_close(found.double(), gradient, rtol=1e-3, atol=1e-3)


def test_they_are_for_bf16_heads_and_few_keys(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_fits", lambda device, size: True)
    q = torch.zeros(1, 300, 2, 128, dtype=torch.bfloat16)
    assert kernels.attends(q, q[:, :128])
    assert not kernels.attends(q, q[:, :129])
    assert not kernels.attends(q.float(), q[:, :128].float())
    assert not kernels.attends(q[..., :96], q[:, :128, :, :96])


def test_they_are_for_cards_that_have_their_shared_memory(kernels, monkeypatch):
    """Of RTX cards and A100s, too little of which torch's kernels take their place."""
    q = torch.zeros(1, 300, 2, SIZE, dtype=torch.bfloat16)
    kernels._fits.cache_clear()
    assert kernels.attends(q, q[:, :128])
    kernels._fits.cache_clear()
    short = kernels.triton.OutOfResources(229376, 101376, "shared memory")
    launch = MagicMock()
    launch.__getitem__.return_value = Mock(side_effect=short)
    monkeypatch.setattr(kernels, "_attend_few_keys_backward", launch)
    assert not kernels.attends(q, q[:, :128])
    kernels._fits.cache_clear()
