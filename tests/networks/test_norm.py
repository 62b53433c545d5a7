"""Trained norms."""

import torch

from library.anima_runtime.attention import RMSNorm
from networks.norm import NormDelta


def test_the_norm_computes_with_weight_plus_delta():
    torch.manual_seed(0)
    norm, delta = RMSNorm(16), NormDelta(16)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(delta.w_norm)
    x = torch.randn(3, 5, 16)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (norm.weight + delta.w_norm)
    torch.testing.assert_close(delta(x, norm(x)), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(delta.merged(norm.weight), norm.weight + delta.w_norm)


def test_a_small_delta_moves_a_bf16_norm():
    """A bf16 weight of 1 would stay 1 under updates of 1e-4."""
    norm, delta = RMSNorm(16).bfloat16().requires_grad_(False), NormDelta(16)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-4, weight_decay=0)
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    delta(x, norm(x)).float().square().mean().backward()
    optimizer.step()
    assert delta.w_norm.dtype == torch.float32
    torch.testing.assert_close(delta.w_norm.abs(), torch.full((16,), 1e-4), rtol=1e-2, atol=0)


def test_weight_decay_pulls_the_norm_to_its_base_value():
    delta = NormDelta(4)
    torch.nn.init.constant_(delta.w_norm, 0.5)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=1.0)
    delta.w_norm.grad = torch.zeros(4)
    for _ in range(50):
        optimizer.step()
    assert delta.merged(torch.full((4,), 1.7)).sub(1.7).abs().max() < 0.01


def test_tensors_round_trip():
    delta = NormDelta(4)
    torch.nn.init.normal_(delta.w_norm)
    again = NormDelta.from_tensors(delta.tensors())
    again.load_tensors(delta.tensors())
    assert set(delta.tensors()) == {"w_norm"}
    assert torch.equal(again.w_norm, delta.w_norm)
