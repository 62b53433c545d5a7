"""LoRA's maths."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks.adapter import NO_DROPOUT, Dropouts
from networks.lora import LoRA


def random_lora(rank=4, alpha=2.0, dropout=NO_DROPOUT) -> LoRA:
    torch.manual_seed(0)
    adapter = LoRA(24, 40, rank, alpha, dropout)
    nn.init.normal_(adapter.lora_up.weight)
    return adapter


@pytest.mark.parametrize(("alpha", "scale"), [(4.0, 1.0), (2.0, 0.5), (16.0, 4.0)])
def test_forward_adds_alpha_over_rank_times_up_down(alpha, scale):
    adapter = random_lora(alpha=alpha)
    x, base = torch.randn(3, 5, 24), torch.randn(3, 5, 40)
    delta = scale * adapter.lora_up.weight @ adapter.lora_down.weight
    torch.testing.assert_close(adapter(x, base), base + x @ delta.T)
    torch.testing.assert_close(adapter.delta_weight(), delta)


def test_delta_equals_lycoris():
    from lycoris.functional.locon import diff_weight

    adapter = random_lora(rank=4, alpha=3.0)
    expected = diff_weight(adapter.lora_down.weight, adapter.lora_up.weight, None, gamma=3.0 / 4)
    torch.testing.assert_close(adapter.delta_weight(), expected, rtol=1e-5, atol=1e-6)


def test_a_new_adapter_changes_nothing():
    adapter = LoRA(24, 40, 4, 1.0)
    base = torch.randn(2, 40)
    assert torch.equal(adapter(torch.randn(2, 24), base), base)
    assert adapter.lora_down.weight.abs().max() <= (1 / 24) ** 0.5 + 1e-6
    assert adapter.lora_down.weight.std() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_and_gradients_stay_float32_under_low_precision(dtype):
    adapter = random_lora()
    output = adapter(torch.randn(2, 24, dtype=dtype), torch.randn(2, 40, dtype=dtype))
    output.float().sum().backward()
    assert output.dtype == dtype
    for parameter in adapter.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_an_update_too_small_for_bf16_is_kept():
    """1 ± 1e-4 is 1 in bf16: a bf16 master would never move from there."""
    adapter = LoRA(24, 40, 4, 4.0)
    nn.init.ones_(adapter.lora_up.weight)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, weight_decay=0)
    x, base = torch.randn(8, 24, dtype=torch.bfloat16), torch.randn(8, 40, dtype=torch.bfloat16)
    adapter(x, base).float().square().mean().backward()
    optimizer.step()
    torch.testing.assert_close((adapter.lora_up.weight - 1).abs(), torch.full((40, 4), 1e-4), rtol=2e-3, atol=0)
    assert torch.equal(adapter.lora_up.weight.bfloat16(), torch.ones(40, 4, dtype=torch.bfloat16))


def test_gradients_equal_those_of_the_dense_delta_in_float64():
    adapter = random_lora(rank=3, alpha=5.0).double()
    x = torch.randn(6, 24, dtype=torch.float64, requires_grad=True)
    base = torch.randn(6, 40, dtype=torch.float64)
    seed = torch.randn(6, 40, dtype=torch.float64)
    inputs = [x, adapter.lora_down.weight, adapter.lora_up.weight]
    ours = torch.autograd.grad(adapter(x, base), inputs, seed)
    dense = base + F.linear(x, 5.0 / 3 * adapter.lora_up.weight @ adapter.lora_down.weight)
    for gradient, expected in zip(ours, torch.autograd.grad(dense, inputs, seed), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_dropout_acts_in_training_only():
    adapter = random_lora(dropout=Dropouts(neuron=0.5))
    x, base = torch.randn(64, 24), torch.zeros(64, 40)
    assert not torch.equal(adapter.train()(x, base), adapter(x, base))
    torch.testing.assert_close(adapter.eval()(x, base), x @ adapter.delta_weight().T)
