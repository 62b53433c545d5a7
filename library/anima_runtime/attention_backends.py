"""The ways to compute the transformer's attention, and which of them work on a device.

All give the same numbers up to rounding; they differ in speed, in memory, and in what they run on.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.anima_runtime.attention import attend

logger = logging.getLogger(__name__)

# (q_BLHD, k_BSHD, v_BSHD) -> (B, L, H * D); every key takes part.
AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_WHAT_AUTO_IS = "torch"


def choose_attention(
    backend: str, head_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, AttentionFunction]:
    """The name and function of the backend asked for, or torch's with a warning that says why the other fails.

    backend: auto, torch, xformers, flash, flash3 or cudnn. It is tried on `device`, with heads of the model's size.
    """
    name = _WHAT_AUTO_IS if backend == "auto" else backend
    if name == "torch":
        return name, attend
    try:
        function = _load(name)
        _try_out(function, head_size, dtype, device)
    except Exception as error:  # compiled packages that do not fit the card or torch end in errors of many types
        reason = " ".join(str(error).split())[:300]
        logger.warning("attention %s does not work here, so torch's is used. The reason: %s", name, reason)
        return "torch", attend
    return name, function


def _load(name: str) -> AttentionFunction:
    """The backend's function. ImportError: it needs a package that is not installed. ValueError: there is none."""
    if name == "xformers":
        return partial(_packaged, importlib.import_module("xformers.ops").memory_efficient_attention)
    if name == "flash3":
        return partial(_packaged, importlib.import_module("flash_attn_interface").flash_attn_func)
    if name == "cudnn":
        return partial(_one_kernel, SDPBackend.CUDNN_ATTENTION)
    if name != "flash":
        raise ValueError("this version of the trainer does not have it")
    try:
        return partial(_packaged, importlib.import_module("flash_attn").flash_attn_func)
    except ImportError:
        return partial(_one_kernel, SDPBackend.FLASH_ATTENTION)


def _packaged(
    function: AttentionFunction, q_BLHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor
) -> torch.Tensor:
    """By a package's function, which gives (B, L, H, D)."""
    return function(q_BLHD, k_BSHD, v_BSHD).flatten(2)


def _one_kernel(kernel: SDPBackend, q_BLHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor) -> torch.Tensor:
    """By one of the kernels torch would choose among. The choice costs 40 µs of the host, but nothing once compiled."""
    with sdpa_kernel(kernel):
        return attend(q_BLHD, k_BSHD, v_BSHD)


def _try_out(function: AttentionFunction, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Runs a function forward and backward. Raises what it raises; ValueError where its numbers differ from torch's."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, length, 2, head_size, generator=generator).to(device, dtype).requires_grad_()
        for length in (64, 96, 96)
    )
    results = [
        (joined, *torch.autograd.grad(joined.sum(), (q, k, v))) for joined in (function(q, k, v), attend(q, k, v))
    ]
    for found, expected in zip(*results, strict=True):
        if not torch.allclose(found.float(), expected.float(), rtol=0.05, atol=0.02):
            raise ValueError("it gives other numbers than torch's attention")
