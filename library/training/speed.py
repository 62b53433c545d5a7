"""How the step is run: plainly, compiled, or captured, and what of that works here; see `library.training.choices`.

torch brings torch._dynamo and torch._inductor when they are first asked for. Importing them here would take seconds of
runs that compile nothing.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from library.options import option

logger = logging.getLogger(__name__)

P, T = ParamSpec("P"), TypeVar("T")

# Compiling pays off after about this many steps: it takes 20 to 60 s and saves 100 ms or so a step.
STEPS_WORTH_COMPILING = 300
# With more buckets than these one form for all numbers of tokens is compiled: 6 % slower, but ready after 40 s rather
# than after 35 s for each bucket.
MOST_FIXED_SHAPES = 2
# One compiled form of a block for each bucket's shape, in training and in sampling.
_COMPILED_FORMS = 256


@dataclass(frozen=True)
class SpeedSettings:
    """How the step is run. Results are the same but for rounding."""

    torch_compile: bool | None = option(
        None,
        "Compile the transformer's blocks: faster steps after a minute's start. Unset: on for CUDA cards that can, in "
        f"runs of {STEPS_WORTH_COMPILING} steps or more. With fused_blocks nothing is left to compile.",
        aliases=("compile",),
    )
    cuda_graphs: bool | None = option(
        None, "Record each bucket's step once and replay it, which spares the processor. Unset: on for CUDA cards."
    )
    fused_blocks: bool | None = option(
        None,
        "Compute the transformer's blocks, and a trained LLM adapter, by this project's own kernels rather than module "
        "by module: faster, and ready at once. Unset: on for bf16 on CUDA cards from Ampere (RTX 30) on, for LoRA and "
        "LoKr without dropout.",
    )


def fuse_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why own kernels do not run here, as far as can be told without trying one; None where they may."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if dtype != torch.bfloat16:
        return "the model is not in bf16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the card is older than Ampere"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (for Windows, its package is triton-windows)"
    return None


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile does not work here, found by compiling a sum; None where it works."""
    if device.type != "cuda":
        return "there is no CUDA device"
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # missing Triton, missing C compiler, old cards: errors of many types
        return " ".join(str(error).split())[:300]
    return None


def compile_modules(modules: Iterable[nn.Module], shapes_vary: bool) -> None:
    """Compiles each module on its first call. Modules of one kind share their compiled form.

    shapes_vary: whether a dimension that the model marks as dynamic is left open; else there is a form for each shape.
    """
    torch.compiler.set_stance("default")  # `or_uncompiled` may have found a former run's not to compile
    torch._dynamo.config.recompile_limit = _COMPILED_FORMS
    torch._dynamo.config.accumulated_recompile_limit = 4 * _COMPILED_FORMS
    options = {}
    if "triton.mix_order_reduction" in torch._inductor.list_options():
        # With it torch 2.11 computes wrong gradients of norm weights: 66 for 0.14, or NaN (H200, 4096 tokens).
        options["triton.mix_order_reduction"] = False
    for module in modules:
        module.compile(dynamic=None if shapes_vary else False, options=options)


def or_uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which calls compiled modules and changes nothing.

    Where one turns out not to compile it is called again, with a warning: from then on all modules run as they are.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:300]
            logger.warning("torch_compile is off from here on, as the model turns out not to compile: %s", reason)
        torch.compiler.set_stance("force_eager")
        return function(*args, **kwargs)

    return run


def uncompiled() -> AbstractContextManager:
    """Inside, compiled modules run as they are: for passes without gradients, which would be compiled anew."""
    return torch.compiler.set_stance("force_eager")
