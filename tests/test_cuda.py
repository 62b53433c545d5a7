"""The same numbers on a CUDA card as on a CPU. These tests skip themselves without one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from library.anima_runtime.attention import attend
from library.anima_runtime.attention_backends import choose_attention
from library.anima_runtime.checkpoint import load_transformer
from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.ops.attention_passes import attend_backward, attend_forward
from library.anima_runtime.sampling.recorded import RecordedForward
from library.anima_runtime.text.encoding import TextEncoder
from library.anima_runtime.text.qwen3 import load_qwen3
from library.anima_runtime.text.tokenizers import load_qwen_tokenizer, load_t5_tokenizer
from library.training.optimization.flat_adamw import FlatAdamW
from library.training.optimization.optimizers import OptimizerSettings, make_optimizer
from library.training.run import RunSettings
from library.training.speed import SpeedSettings
from networks import loha_anima, lokr_anima, lora_anima
from tools.anima_shapes import REAL, transformer_shapes
from tools.benchmark_cases import COMPILED, EAGER, LOKR, LORA, Case, endless_batches, ready_trainer

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


@pytest.mark.parametrize("left_out", [None, 0, 2])
def test_flat_adamw_gives_torchs_bits(left_out):
    """Of tensors that do and do not fill whole vectors, with steps that are left out on the device."""
    theirs, ours = (
        [torch.nn.Parameter(torch.full(shape, 0.5, device="cuda")) for shape in ((16, 2048), (3, 7), (1,), (70000,))]
        for _ in range(2)
    )
    flat = FlatAdamW([{"params": ours[:2]}, {"params": ours[2:], "lr": 1e-2}], fused=True)
    plain = torch.optim.AdamW([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 1e-2}], fused=True)
    flat.flatten(ours)
    for step in range(4):
        for expected, found in zip(theirs, ours, strict=True):
            expected.grad = torch.randn_like(expected)
            found.grad.copy_(expected.grad)
        for optimizer in (plain, flat):
            optimizer.found_inf = torch.tensor(float(step == left_out), device="cuda")
            optimizer.step()
    for expected, found in zip(theirs, ours, strict=True):
        assert torch.equal(expected, found)
        for name, value in plain.state[expected].items():
            assert torch.equal(value, flat.state[found][name]), name


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


@pytest.mark.parametrize("zeros", [0, 300])
@pytest.mark.parametrize(("samples", "length", "keys"), [(2, 1000, 128), (1, 4096, 100), (1, 4096, 200), (3, 640, 640)])
def test_attentions_two_passes_equal_float64(samples, length, keys, zeros):
    """By the kernels that torch chooses; some keys of zeros are not there."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("these kernels need an Ampere card or newer")
    draw = lambda rows: torch.randn(samples, rows, 16, 128, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v, dout = draw(length), draw(keys), draw(keys), draw(length).flatten(2)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    all_keys, all_values = (F.pad(x, (0, 0, 0, 0, 0, zeros)) for x in leaves[1:])
    logits = torch.einsum("blhd,bshd->bhls", leaves[0], all_keys) / 128**0.5
    out = torch.einsum("bhls,bshd->blhd", logits.softmax(-1), all_values).flatten(2)
    expected = out, *torch.autograd.grad(out, leaves, dout.double())
    attended = attend_forward(attend, q, k, v, zeros)
    found = attended.output, *attend_backward(attended, dout.flatten(0, 1))
    for own, exact in zip(found, expected, strict=True):
        assert (own - exact).norm() < 0.01 * exact.norm()


def test_kernels_that_cannot_compute_float32_fall_back(caplog):
    assert choose_attention("cudnn", 128, torch.float32, torch.device("cuda")) == ("torch", attend)
    assert "attention cudnn does not work here" in caplog.text


@pytest.fixture(scope="module")
def real_width_config():
    """The real widths, so that compilers meet the real kernels; few blocks, so that it stays quick."""
    shapes = transformer_shapes(replace(REAL, depth=2, adapter_depth=2), 32128)
    return AnimaConfig.from_shapes(shapes)


def gradients_of_steps(config, speed, network, checkpointing=False, steps=3):
    """Gradients of each adapter tensor after each of a few steps that do not move the weights."""
    torch._dynamo.reset()
    case = Case(network=network, speed=speed, sides=((1024, 1024), (512, 512)), checkpointing=checkpointing)
    trainer = ready_trainer(case, torch.device("cuda"), config)
    with torch.no_grad():
        for name, parameter in trainer.network.named_parameters():
            generator = torch.Generator("cuda").manual_seed(len(name))
            parameter.normal_(std=0.02, generator=generator)
    kept = []
    for optimizer_step in ("step", "zero_grad"):
        setattr(trainer.parts.optimizer, optimizer_step, lambda *args, **kwargs: None)
    batches = endless_batches(case, config)
    for _ in range(steps):
        for parameter in trainer.network.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        trainer.step([next(batches)], 1)
        kept.append({name: p.grad.clone() for name, p in trainer.network.named_parameters()})
    return kept


@pytest.mark.parametrize("network", [LORA, LOKR], ids=["lora", "lokr"])
@pytest.mark.parametrize(
    ("speed", "checkpointing"),
    [
        (COMPILED, False),
        (SpeedSettings(False, True, False), False),
        (SpeedSettings(True, True, False), True),
        (SpeedSettings(False, False, True), False),
        (SpeedSettings(False, True, True), True),
    ],
    ids=["compiled", "recorded", "both, checkpointing", "fused", "fused and recorded, checkpointing"],
)
def test_fast_steps_give_the_plain_steps_gradients(real_width_config, network, speed, checkpointing):
    """bf16 rounds at other places when compiled: 2 % of a tensor's norm, where a wrong kernel is off by far more."""
    plain = gradients_of_steps(real_width_config, EAGER, network)
    fast = gradients_of_steps(real_width_config, speed, network, checkpointing)
    for expected, found in zip(plain, fast, strict=True):
        for name, gradient in expected.items():
            distance = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert distance < 0.05, (name, distance.item())


@pytest.mark.parametrize("speed", [SpeedSettings(False, False, True), SpeedSettings(True, True, True)])
def test_checkpoints_that_wait_in_main_memory_change_no_gradient(monkeypatch, speed):
    """But for what attention's backward pass, which adds in any order, changes from run to run."""
    shapes = transformer_shapes(replace(REAL, depth=3, adapter_depth=1), 32128)
    config = AnimaConfig.from_shapes(shapes)
    found = []
    for checkpointing, parks in ((False, False), (True, False), (True, True)):
        run = partial(RunSettings, cpu_offload_checkpointing=parks)
        monkeypatch.setattr("tools.benchmark_cases.RunSettings", run)
        found.append(gradients_of_steps(config, speed, LORA, checkpointing))
    for others in zip(*found, strict=True):
        for name, expected in others[0].items():
            for gradient in others[1:]:
                distance = (gradient[name] - expected).norm() / expected.norm().clamp(min=1e-12)
                assert distance < 0.02, (name, distance.item())


def test_no_step_waits_for_the_gpu(real_width_config):
    case = Case(sides=((512, 512),), speed=SpeedSettings(False, True))
    trainer = ready_trainer(case, torch.device("cuda"), real_width_config)
    batches = endless_batches(case, real_width_config)
    for _ in range(3):
        trainer.step([next(batches)], 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.step([next(batches)], 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captions_become_the_same_bits_in_any_company_while_qwen_only_visits(tiny_anima, dtype):
    tokenizers = load_qwen_tokenizer(tiny_anima / "qwen3"), load_t5_tokenizer(tiny_anima / "t5")
    encoder = TextEncoder(load_qwen3(tiny_anima / "qwen3", dtype, "cuda"), *tokenizers)
    captions = ["", "a red square", "blue circle, flat colors", "a green triangle on a white sky " * 20] * 3
    there = encoder.encode(captions)
    encoder.leave_device()
    for caption, expected in zip(captions, there, strict=True):
        (alone,) = encoder.encode([caption])
        assert alone.qwen_states.device.type == "cuda" and torch.equal(alone.qwen_states, expected.qwen_states)
    assert {parameter.device.type for parameter in encoder.qwen.parameters()} == {"cpu"}


def test_a_recorded_forward_pass_gives_the_models_numbers_with_its_weights_as_they_are(real_width_config):
    trainer = ready_trainer(Case(speed=EAGER), torch.device("cuda"), real_width_config)
    forward, generator = RecordedForward(trainer.transformer), torch.Generator("cuda").manual_seed(0)
    for side in (64, 48, 64):
        latents = torch.randn(2, 16, 1, side, 64, device="cuda", generator=generator)
        inputs = latents, torch.tensor([0.5, 0.5], device="cuda"), torch.randn(2, 512, 1024, device="cuda")
        with torch.no_grad():
            for parameter in trainer.network.parameters():
                parameter.normal_(std=0.02, generator=generator)
            expected = trainer.transformer(*inputs)
        assert (forward(*inputs) - expected).norm() / expected.norm() < 0.01


def test_a_pass_that_cannot_be_recorded_is_made_without(caplog):
    forward = RecordedForward(lambda x: x + x.sum().item())  # it waits for the GPU
    assert forward(torch.ones(2, device="cuda")).tolist() == [3.0, 3.0]
    assert "rendered without" in caplog.text
