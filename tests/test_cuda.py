"""The same numbers on a CUDA card as on a CPU. These tests skip themselves without one."""

from __future__ import annotations

import pytest
import torch

from library.anima_runtime.attention import attend
from library.anima_runtime.attention_backends import choose_attention
from library.anima_runtime.checkpoint import load_transformer
from library.training.optimizers import OptimizerSettings, make_optimizer
from networks import loha_anima, lokr_anima, lora_anima

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

NETWORKS = {
    "lora": (lora_anima, {}),
    "dora": (lora_anima, {"dora": True}),
    "lokr": (lokr_anima, {"full_matrix": True}),
    "loha": (loha_anima, {}),
}


def losses_and_gradients(tiny_anima, module, arguments, device, dtype):
    """A loss through the LLM adapter and the transformer, and the gradient of every adapter weight, on the CPU."""
    model = load_transformer(tiny_anima / "anima.safetensors", dtype, device)
    torch.manual_seed(0)
    network = module.create_network(1.0, 4, 4.0, None, None, model.cpu(), **arguments)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.to(device)
    network.to(device)
    network.apply_to(None, model)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 1, 12, 10, generator=generator).to(device)
    states = torch.randn(2, 5, 32, generator=generator).to(device, dtype)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=device)
    ids = torch.arange(8, device=device).view(2, 4)
    context = model.encode_context(states, mask, ids, mask[:, :4])
    loss = model(latents, torch.tensor([0.3, 0.8], device=device), context).float().square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu() for p in network.parameters()])


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_losses_and_gradients_equal_the_cpus(tiny_anima, kind, dtype, bound):
    expected, expected_gradient = losses_and_gradients(tiny_anima, *NETWORKS[kind], "cpu", torch.float32)
    loss, gradient = losses_and_gradients(tiny_anima, *NETWORKS[kind], "cuda", dtype)
    assert loss == pytest.approx(expected, rel=bound)
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < bound


def test_adamw_runs_fused():
    group = {"name": "all", "params": [torch.nn.Parameter(torch.ones(3, device="cuda"))]}
    assert make_optimizer(OptimizerSettings(), [group], torch.device("cuda")).defaults["fused"] is True


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_attention_kernels_equal_float32(backend, dtype):
    """At the real head size; flash_attn stands in for torch's own kernel where it is installed."""
    name, function = choose_attention(backend, 128, dtype, torch.device("cuda"))
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("these kernels need an Ampere card or newer")
    assert name == backend
    heads = [torch.randn(1, length, 16, 128, device="cuda", dtype=dtype) for length in (1024, 512, 512)]
    expected = attend(*(x.float() for x in heads))
    assert (function(*heads).float() - expected).norm() / expected.norm() < 0.01


def test_kernels_that_cannot_compute_float32_fall_back(caplog):
    assert choose_attention("cudnn", 128, torch.float32, torch.device("cuda")) == ("torch", attend)
    assert "attention cudnn does not work here" in caplog.text
