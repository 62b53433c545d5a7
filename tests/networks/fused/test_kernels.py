"""Whole fused passes with every kernel in Triton's interpreter, against the modules with hooks in float64.

Tensors say that they are on a card, so all that is done for one is done here: rooms, strides, and stand-ins.
"""

from dataclasses import replace

import pytest
import torch

from library.anima_runtime.memory.low_memory import quantise_blocks
from library.anima_runtime.memory.weight_swap import WeightSwap
from library.anima_runtime.ops import attention_passes
from networks import lokr_anima, lora_anima
from networks.fused.blocks import fuse_blocks, fuse_obstacle
from tests.networks.fused import test_blocks
from tests.networks.fused.test_blocks import CONFIG, CPU, WHOLE, model_and_network

CASES = {
    "lora": (lora_anima, {}, 4),
    "lora, added at once, of the modulations too": (
        lora_anima, {"target_modules": "blocks.*q_proj,blocks.*layer2,blocks.*adaln_modulation_mlp.1"}, 40
    ),
    "lokr, whole": (lokr_anima, WHOLE, 4),
    "lokr, low-rank": (lokr_anima, {"decompose_both": "True", "factor": "8"}, 4),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """The least widths that the kernels take, one block of each kind."""
    adapter = replace(CONFIG.llm_adapter, width=256, head_size=32, mlp_width=256, context_width=256, depth=1)
    config = replace(CONFIG, width=256, head_size=64, mlp_width=256, depth=1, context_width=256, llm_adapter=adapter)
    monkeypatch.setattr(test_blocks, "CONFIG", config)


@pytest.fixture
def card(monkeypatch):
    """card(): from then on tensors say that they are on a card. The CPU's attention stands in for torch's kernels."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a card")
    from library.anima_runtime.ops import few_keys_kernels

    monkeypatch.setattr(few_keys_kernels, "attends", lambda q, k: k.shape[1] <= 16)
    monkeypatch.setattr(attention_passes, "_kernel", lambda q, k, v: attention_passes._by_cpu_flash)
    return lambda: monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)


def loss_and_gradients(model, network, dtype, captions):
    """Through the LLM adapter and the blocks. captions: numbers of Qwen and T5 tokens."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    masks = [torch.arange(max(side)) < torch.tensor(side)[:, None] for side in zip(*captions, strict=True)]
    states = draw(*masks[0].shape, test_blocks.CONFIG.llm_adapter.source_width)
    ids = torch.randint(0, 50, masks[1].shape, generator=generator)
    context = model.encode_context(states, masks[0], ids, masks[1], min_length=0)
    loss = model(draw(2, 16, 1, 8, 12), torch.tensor([0.3, 0.8]), context, zero_rows=40).square().mean()
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.item(), dict(zip(parameters, gradients, strict=True))


def each_case():
    """The first quickly enough for every run of the tests; ten seconds and more for each of the others."""
    for captions in ([(7, 9), (12, 1)], [(3, 30), (5, 5)]):  # fewer and more keys than queries
        for case in CASES:
            is_first = case == "lora" and captions[0] == (7, 9)
            yield pytest.param(case, captions, marks=[] if is_first else [pytest.mark.slow])


@pytest.mark.parametrize(("case", "captions"), list(each_case()))
def test_losses_and_gradients_are_those_of_the_modules(small, card, case, captions):
    check(card, case, captions)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "lokr, whole"])
@pytest.mark.parametrize("eight_bits", [False, True], ids=["", "8 bits"])
def test_weights_may_lie_elsewhere_and_have_8_bits(small, card, case, eight_bits):
    """They are written out for each product by a kernel."""
    check(card, case, [(7, 9), (12, 1)], eight_bits, swap=WeightSwap(1, CPU))


def check(card, case, captions, eight_bits=False, swap=None):
    module, arguments, dim = CASES[case]
    plain = model_and_network(module, arguments, False, dim, eight_bits)
    loss, expected = loss_and_gradients(*plain, torch.float64, captions)
    model, network = model_and_network(module, arguments, False, dim)
    model.float()
    network.float()
    if eight_bits:
        quantise_blocks(model)
    assert fuse_obstacle(model, network) is None
    fuse_blocks(model, network, swap=swap)
    card()
    found_loss, found = loss_and_gradients(model, network, torch.float32, captions)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        if gradient is not None:
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
