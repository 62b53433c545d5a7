"""8-bit blocks and blocks in main memory: the same numbers, as far as rounding allows."""

import pytest
import torch
from torch import nn

from library.anima_runtime.config import AnimaConfig, LLMAdapterConfig
from library.anima_runtime.low_memory import Float8Linear, MemorySettings, place_transformer, quantise_blocks
from library.anima_runtime.transformer import AnimaTransformer
from networks import lora_anima

CPU = torch.device("cpu")
CONFIG = AnimaConfig(
    latent_channels=16, patch_size=2, width=64, depth=5, head_size=32, mlp_width=128, context_width=32, adaln_rank=8,
    llm_adapter=LLMAdapterConfig(
        vocabulary=64, width=32, depth=1, head_size=16, mlp_width=48, source_width=24, context_width=32
    ),
)  # fmt: skip


def loss_and_gradients(settings, checkpointing=True):
    torch.manual_seed(0)
    transformer = AnimaTransformer(CONFIG).requires_grad_(False)
    transformer.gradient_checkpointing = checkpointing
    network = lora_anima.create_network(1.0, 4, 4.0, None, None, transformer)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    network.apply_to(None, transformer)
    place_transformer(transformer, settings, CPU)
    generator = torch.Generator().manual_seed(1)
    results = []
    for _ in range(2):
        latents = torch.randn(2, 16, 1, 8, 6, generator=generator)
        context = torch.randn(2, 12, 32, generator=generator)
        loss = transformer(latents, torch.tensor([0.3, 0.8]), context).square().mean()
        loss.backward()
        results.append(loss.item())
    used = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(used) > 100
    return results, torch.cat([gradient.flatten() for gradient in used])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_swapped_blocks_change_no_number(count):
    losses, gradients = loss_and_gradients(MemorySettings())
    swapped_losses, swapped_gradients = loss_and_gradients(MemorySettings(blocks_to_swap=count))
    assert swapped_losses == losses
    assert torch.equal(swapped_gradients, gradients)


def test_only_two_swapped_blocks_have_weights_at_once():
    transformer = AnimaTransformer(CONFIG).requires_grad_(False)
    inputs = torch.randn(1, 16, 1, 4, 4), torch.tensor([0.5]), torch.randn(1, 8, 32)
    with torch.no_grad():
        before = transformer(*inputs)
        place_transformer(transformer, MemorySettings(blocks_to_swap=4), CPU)
        assert [block.mlp.layer1.weight.numel() > 0 for block in transformer.blocks] == [True] + [False] * 4
        assert torch.equal(transformer(*inputs), before)
        assert [block.mlp.layer1.weight.numel() > 0 for block in transformer.blocks] == [True, False, False, True, True]
        transformer.blocks[4].mlp.layer1.weight.data.zero_()  # in its buffer, which others use next
        assert torch.equal(transformer(*inputs), before)


def test_an_8_bit_linear_multiplies_by_the_rounded_weight_and_passes_gradients_through():
    torch.manual_seed(0)
    block = nn.Module()
    block.linear = nn.Linear(24, 16)
    weight = block.linear.weight.detach().clone()
    holder = nn.Module()
    holder.blocks = [block]
    quantise_blocks(holder)
    assert isinstance(block.linear, Float8Linear) and block.linear.weight.dtype == torch.float8_e4m3fn
    kept = block.linear.weight.float() * block.linear.scale_O1
    # e4m3 has 3 bits after the leading one: half a unit in the last place is 1/16 of the value, less for small ones.
    assert ((kept - weight).abs() <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) / 448 / 512).all()
    x = torch.randn(5, 24, requires_grad=True)
    output = block.linear(x)
    torch.testing.assert_close(output, x @ kept.t() + block.linear.bias)
    output.sum().backward()
    torch.testing.assert_close(x.grad, kept.sum(0).expand(5, -1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.005)])
def test_an_8_bit_linear_and_its_gradient_equal_plain_maths(dtype, tolerance):
    """bfloat16 rounds scale, weight and result: each by at most 2⁻⁹ = 0.002 of itself."""
    torch.manual_seed(0)
    holder = nn.Module()
    holder.blocks = [nn.Sequential(nn.Linear(24, 16, bias=False, dtype=dtype))]
    quantise_blocks(holder)
    (linear,) = holder.blocks[0]
    kept_OI = linear.weight.double() * linear.scale_O1.double()
    x, dout = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True), torch.randn(2, 5, 16, dtype=dtype)
    output = linear(x)
    output.backward(dout)
    assert output.dtype == x.grad.dtype == dtype
    for value, exact in [(output, x.double() @ kept_OI.t()), (x.grad, dout.double() @ kept_OI)]:
        assert value.shape == exact.shape
        assert (value.double() - exact).norm() <= tolerance * exact.norm()


def test_8_bit_blocks_stay_close_to_the_model_and_can_be_swapped_too():
    losses, gradients = loss_and_gradients(MemorySettings())
    eight_bit_losses, eight_bit_gradients = loss_and_gradients(MemorySettings(fp8_base=True), checkpointing=False)
    assert eight_bit_losses == pytest.approx(losses, rel=0.05)
    cosine = torch.nn.functional.cosine_similarity(gradients, eight_bit_gradients, dim=0)
    assert 0.99 < cosine < 0.99999
    both, both_gradients = loss_and_gradients(MemorySettings(fp8_base=True, blocks_to_swap=3))
    assert both == pytest.approx(eight_bit_losses, rel=1e-6)
    torch.testing.assert_close(both_gradients, eight_bit_gradients, rtol=1e-4, atol=1e-7)
