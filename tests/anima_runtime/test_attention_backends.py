from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch

from library.anima_runtime.attention import attend
from library.anima_runtime.attention_backends import choose_attention
from library.anima_runtime.checkpoint import load_transformer

CPU = torch.device("cpu")


def by_the_formula(q_BLHD, k_BSHD, v_BSHD):
    """As xformers and flash_attn have it: (B, L, H, D) in and out."""
    scores = torch.einsum("blhd,bshd->bhls", q_BLHD, k_BSHD) / math.sqrt(q_BLHD.shape[-1])
    return torch.einsum("bhls,bshd->blhd", scores.softmax(dim=-1), v_BSHD)


@pytest.fixture
def package(monkeypatch):
    """package("xformers.ops", "name", function) stands in for a package that is not installed here."""

    def install(module_name, function_name, function):
        module = ModuleType(module_name)
        setattr(module, function_name, function)
        if "." in module_name:
            monkeypatch.setitem(sys.modules, module_name.partition(".")[0], ModuleType("parent"))
        monkeypatch.setitem(sys.modules, module_name, module)

    return install


@pytest.fixture
def no_packages(monkeypatch):
    for name in ("xformers", "xformers.ops", "flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)


def random_heads(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, length, 3, 16, generator=generator, dtype=dtype).requires_grad_() for length in (10, 7, 7)]


def assert_equals_the_formula(function):
    heads = random_heads()
    expected = by_the_formula(*heads).flatten(2)
    found = function(*heads)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), heads),
        torch.autograd.grad((expected * weights).sum(), heads),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("asked", "got"), [("auto", "torch"), ("torch", "torch"), ("flash", "flash")])
def test_backends_of_a_cpu_equal_the_formula(no_packages, caplog, asked, got):
    name, function = choose_attention(asked, 16, torch.float32, CPU)
    assert name == got
    assert_equals_the_formula(function)
    assert not caplog.records


@pytest.mark.parametrize(
    ("backend", "module", "function"),
    [
        ("xformers", "xformers.ops", "memory_efficient_attention"),
        ("flash", "flash_attn", "flash_attn_func"),
        ("flash3", "flash_attn_interface", "flash_attn_func"),
    ],
)
def test_packages_are_called_with_their_layout(package, backend, module, function):
    calls = []

    def counted(q, k, v):
        calls.append(tuple(q.shape))
        return by_the_formula(q, k, v)

    package(module, function, counted)
    name, chosen = choose_attention(backend, 16, torch.float32, CPU)
    assert name == backend
    assert_equals_the_formula(chosen)
    assert calls[-1] == (2, 10, 3, 16)


@pytest.mark.parametrize(("backend", "package"), [("xformers", "xformers"), ("flash3", "flash_attn_interface")])
def test_without_its_package_a_backend_falls_back_with_the_reason(no_packages, caplog, backend, package):
    name, function = choose_attention(backend, 16, torch.float32, CPU)
    assert (name, function) == ("torch", attend)
    (warning,) = caplog.messages
    assert warning.startswith(
        f"attention {backend} does not work here, so torch's is used. The reason: import of {package}"
    )


def test_a_backend_of_another_version_falls_back(caplog):
    assert choose_attention("sage", 16, torch.float32, CPU) == ("torch", attend)
    assert "attention sage does not work here" in caplog.text and "does not have it" in caplog.text


def test_cudnn_falls_back_on_a_cpu(caplog):
    assert choose_attention("cudnn", 16, torch.float32, CPU) == ("torch", attend)
    assert "attention cudnn does not work here, so torch's is used. The reason: No " in caplog.text


def fails(q, k, v):
    raise NotImplementedError("No operator found:\n    requires a GPU with\n    compute capability 8.0")


def without_gradient(q, k, v):
    return by_the_formula(q, k, v).detach()


def other_layout(q, k, v):
    return by_the_formula(q.flip(1), k, v)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (fails, "No operator found: requires a GPU with compute capability 8.0"),
        (without_gradient, "does not require grad"),
        (other_layout, "it gives other numbers than torch's attention"),
    ],
)
def test_a_package_that_does_not_work_on_the_device_is_found_out(package, caplog, function, reason):
    package("xformers.ops", "memory_efficient_attention", function)
    assert choose_attention("xformers", 16, torch.float32, CPU) == ("torch", attend)
    assert reason in caplog.text


def test_the_model_computes_its_blocks_attention_by_the_chosen_function(tiny_anima):
    model = load_transformer(tiny_anima / "anima.safetensors", torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 1, 8, 8, generator=generator)
    inputs = (latents, torch.tensor([0.4]), torch.randn(1, 6, model.config.context_width, generator=generator))
    with torch.no_grad():
        plain = model(*inputs)
        calls = []
        model.use_attention(lambda q, k, v: calls.append(1) or by_the_formula(q, k, v).flatten(2))
        torch.testing.assert_close(model(*inputs), plain, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * model.config.depth


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_kernel_of_torchs_trains_with_recompute_and_compiles_without_a_break(checkpointing, tiny_anima):
    """Recompute runs in the backward pass: the kernel must be chosen there as well."""
    _, flash = choose_attention("flash", 16, torch.float32, CPU)
    model = load_transformer(tiny_anima / "anima.safetensors", torch.float32, "cpu")
    model.use_attention(flash)
    model.gradient_checkpointing = checkpointing
    latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    context = torch.randn(1, 6, model.config.context_width, generator=torch.Generator().manual_seed(1))
    model(latents, torch.tensor([0.4]), context).square().mean().backward()
    gradient = latents.grad.clone()
    latents.grad = None
    model.use_attention(attend)
    model(latents, torch.tensor([0.4]), context).square().mean().backward()
    torch.testing.assert_close(gradient, latents.grad, rtol=1e-4, atol=1e-7)
    compiled = torch.compile(flash, fullgraph=True, backend="aot_eager")
    assert_equals_the_formula(compiled)
