"""8-bit blocks and blocks in main memory: the same numbers, as far as rounding allows."""

import pytest
import torch
from torch import nn

from library.anima_runtime.config import AnimaConfig, LLMAdapterConfig
from library.anima_runtime.memory.float8 import Float8Linear
from library.anima_runtime.memory.low_memory import BlockSwap, MemorySettings, place_transformer, quantise_blocks
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
    if settings.blocks_to_swap:
        BlockSwap(transformer, settings.blocks_to_swap, CPU)
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
        BlockSwap(transformer, 4, CPU)
        assert [block.mlp.layer1.weight.numel() > 0 for block in transformer.blocks] == [True] + [False] * 4
        assert torch.equal(transformer(*inputs), before)
        assert [block.mlp.layer1.weight.numel() > 0 for block in transformer.blocks] == [True, False, False, True, True]
        transformer.blocks[4].mlp.layer1.weight.data.zero_()  # in its buffer, which others use next
        assert torch.equal(transformer(*inputs), before)


def test_all_linears_of_the_blocks_but_the_modulations_become_8_bit():
    transformer = AnimaTransformer(CONFIG)
    quantise_blocks(transformer)
    kinds = {
        (name.split(".")[2], isinstance(module, Float8Linear))
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.")
    }
    modulations = {f"adaln_modulation_{branch}" for branch in ("self_attn", "cross_attn", "mlp")}
    assert kinds == {(part, True) for part in ("self_attn", "cross_attn", "mlp")} | {
        (part, False) for part in modulations
    }
    assert not any(isinstance(module, Float8Linear) for module in transformer.llm_adapter.modules())


def test_8_bit_blocks_stay_close_to_the_model_and_can_be_swapped_too():
    losses, gradients = loss_and_gradients(MemorySettings())
    eight_bit_losses, eight_bit_gradients = loss_and_gradients(MemorySettings(fp8_base=True), checkpointing=False)
    assert eight_bit_losses == pytest.approx(losses, rel=0.05)
    cosine = torch.nn.functional.cosine_similarity(gradients, eight_bit_gradients, dim=0)
    assert 0.99 < cosine < 0.99999
    both, both_gradients = loss_and_gradients(MemorySettings(fp8_base=True, blocks_to_swap=3))
    assert both == pytest.approx(eight_bit_losses, rel=1e-6)
    torch.testing.assert_close(both_gradients, eight_bit_gradients, rtol=1e-4, atol=1e-7)
