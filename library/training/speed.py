"""How the step is run: plainly, compiled, or captured; chosen by the machine where nothing is set."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from library.options import option

logger = logging.getLogger(__name__)

# Compiling pays off after about this many steps: it takes 20 to 60 s and saves 100 ms or so a step.
STEPS_WORTH_COMPILING = 300
# One compiled form of a block for each bucket's shape, in training and in sampling.
_COMPILED_FORMS = 256


@dataclass(frozen=True)
class SpeedSettings:
    """How the step is run. Results are the same but for rounding."""

    torch_compile: bool | None = option(
        None,
        "Compile the transformer's blocks: faster steps after a minute's start. Unset: on for CUDA cards that can, in "
        f"runs of {STEPS_WORTH_COMPILING} steps or more.",
        aliases=("compile",),
    )
    cuda_graphs: bool | None = option(
        None, "Record each bucket's step once and replay it: spares the processor. Unset: on where torch_compile is."
    )


@dataclass(frozen=True)
class SpeedChoice:
    """What a run does, and why."""

    compiles: bool
    captures: bool
    reason: str

    def described(self, capture_obstacle: str | None) -> str:
        """One line for the start of a run."""
        compiled = f"blocks {'compiled' if self.compiles else 'not compiled'} ({self.reason})"
        if self.captures and capture_obstacle is not None:
            return f"{compiled}; steps not recorded as CUDA graphs: {capture_obstacle}"
        return f"{compiled}; steps {'' if self.captures else 'not '}recorded as CUDA graphs"


def choose_speed(settings: SpeedSettings, device: torch.device, total_steps: int) -> SpeedChoice:
    """As set; else by device and length of the run."""
    obstacle = compile_obstacle(device)
    compiles = settings.torch_compile
    reason = "as set"
    if compiles is None:
        compiles = obstacle is None and total_steps >= STEPS_WORTH_COMPILING
        reason = obstacle or f"{total_steps} steps"
    elif compiles and obstacle is not None:
        logger.warning("torch_compile: %s; the blocks run without it", obstacle)
        compiles, reason = False, obstacle
    captures = settings.cuda_graphs if settings.cuda_graphs is not None else compiles
    if captures and device.type != "cuda":
        if settings.cuda_graphs:
            logger.warning("cuda_graphs: there is no CUDA device; steps are not recorded")
        captures = False
    return SpeedChoice(compiles, captures, reason)


def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile would not work here; None where it should."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "the card is older than Triton supports (compute capability 7.0)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (on Windows: pip install triton-windows)"
    return None


def compile_modules(modules: Iterable[nn.Module]) -> None:
    """Compiles each module on its first call. Modules of one kind share their compiled form, one for each shape."""
    torch._dynamo.config.recompile_limit = _COMPILED_FORMS
    torch._dynamo.config.accumulated_recompile_limit = 4 * _COMPILED_FORMS
    for module in modules:
        module.compile(dynamic=False)
