"""How a step is computed where the settings leave it open: what is chosen, why, and how a resumed run repeats it.

A setting that is given acts. One left unset is what the resumed run chose, where that works on this machine, and else
what is best on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch

from library.training.machine import describe_device, readable_size
from library.training.run import RunSettings
from library.training.speed import STEPS_WORTH_COMPILING, SpeedSettings, compile_obstacle, fuse_obstacle

logger = logging.getLogger(__name__)

AS_SET = "as set"
AS_BEFORE = "as in the resumed run"
_NO_CUDA = "there is no CUDA device"

# What a state says of the run that saved it: choices by the settings' names, and the device they were made for.
Recorded = Mapping[str, Any]


class StepMemory(NamedTuple):
    """Bytes of a card that the run would take without gradient checkpointing, and how many it may.

    kept: where all that the backward pass needs is kept. selective: with `selective_checkpointing`.
    """

    kept: int
    selective: int
    limit: int


@dataclass(frozen=True)
class Choice:
    """What a setting is in this run, and why."""

    name: str
    value: bool | str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {shown(self.value)}: {self.reason}"


def shown(value: bool | str) -> str:
    """A value as people read it."""
    return value if isinstance(value, str) else "on" if value else "off"


def told(choices: Iterable[Choice]) -> str:
    """All choices with their reasons, a line each."""
    return "\n  ".join(["how steps are computed:", *map(str, choices)])


def recorded(choices: Iterable[Choice], device: torch.device) -> dict[str, Any]:
    """What a state says of them; a run that resumes it takes that as `before`."""
    return {**{choice.name: choice.value for choice in choices}, "device": describe_device(device)}


def choose_fusing(
    settings: SpeedSettings,
    before: Recorded,
    device: torch.device,
    dtype: torch.dtype,
    find_obstacle: Callable[[], str | None],
) -> Choice:
    """Whether the blocks are computed by own kernels; by default where that works.

    find_obstacle: tells why this run's blocks cannot be; asked where the machine has nothing against it.
    """
    default = Choice("fused_blocks", False, _NO_CUDA)
    if device.type == "cuda":
        precision = str(dtype).removeprefix("torch.")
        default = Choice("fused_blocks", True, f"{precision} on {torch.cuda.get_device_name(device)}")
    wanted = _wanted(settings.fused_blocks, before, default)
    return _if_possible(wanted, lambda: fuse_obstacle(device, dtype) or find_obstacle())


def choose_compiling(
    settings: SpeedSettings, before: Recorded, device: torch.device, total_steps: int, fuses: bool, obstacle: str | None
) -> Choice:
    """Whether the blocks are compiled; by default where it works and pays.

    fuses: whether they are computed by own kernels. obstacle: why this run's blocks cannot be compiled, which is warned
    of only where that was asked for; why the machine cannot is found by trying, and warned of.
    """
    if before.get("fused_blocks") and not fuses and not before.get("torch_compile"):
        before = {}  # it was off because own kernels left nothing to compile
    if device.type != "cuda":
        default = Choice("torch_compile", False, _NO_CUDA)
    elif obstacle is not None:
        default = Choice("torch_compile", False, obstacle)
    elif total_steps < STEPS_WORTH_COMPILING:
        default = Choice("torch_compile", False, f"{total_steps} steps are fewer than {STEPS_WORTH_COMPILING}")
    else:
        default = Choice("torch_compile", True, f"{total_steps} steps are {STEPS_WORTH_COMPILING} or more")
    wanted = _wanted(settings.torch_compile, before, default)
    return _if_possible(wanted, lambda: obstacle or compile_obstacle(device))


def choose_graphs(settings: SpeedSettings, before: Recorded, device: torch.device, obstacle: str | None) -> Choice:
    """Whether steps are recorded; by default on CUDA. obstacle: why this run's steps cannot be."""
    if device.type != "cuda":
        obstacle = _NO_CUDA
    default = Choice("cuda_graphs", obstacle is None, obstacle or "steps on a CUDA device can be recorded")
    return _if_possible(_wanted(settings.cuda_graphs, before, default), lambda: obstacle)


def choose_checkpointing(
    settings: RunSettings,
    before: Recorded,
    device: torch.device,
    swaps_blocks: bool,
    fuses: bool,
    memory: StepMemory | None,
) -> Choice:
    """Whether activations are computed again in the backward pass; by default on CUDA where the card is too small.

    On such a card a resumed run that did without is repeated only where it ran on one of the same kind. memory: None
    without a card.
    """
    if swaps_blocks:
        default = Choice("gradient_checkpointing", True, "blocks_to_swap needs it")
    elif memory is None:
        default = Choice("gradient_checkpointing", False, _NO_CUDA)
    else:
        can_select = fuses and settings.selective_checkpointing is not False
        least = memory.selective if can_select else memory.kept
        default = Choice("gradient_checkpointing", least > memory.limit, f"without it, {_compared(least, memory)}")
    wanted = _wanted(settings.gradient_checkpointing, before, default)
    if wanted.reason != AS_BEFORE or wanted.value or not default.value:
        return wanted
    if not swaps_blocks and before.get("device") == describe_device(device):
        return wanted
    return _instead(wanted, True, default.reason)


def choose_selecting(settings: RunSettings, checkpoints: bool, fuses: bool, memory: StepMemory | None) -> Choice:
    """Whether less is kept for the backward pass, and passes over memory are made again; by default where it must be.

    checkpoints: whether all is computed again. What a resumed run chose does not matter: the numbers are the same.
    """
    if memory is None:
        obstacle = _NO_CUDA
    elif not fuses:
        obstacle = "fused_blocks is off"
    else:
        obstacle = "gradient_checkpointing is on" if checkpoints else None
    is_wanted = obstacle is None and memory.kept > memory.limit
    reason = obstacle or f"without it, {_compared(memory.kept, memory)}"
    default = Choice("selective_checkpointing", is_wanted, reason)
    return _if_possible(_wanted(settings.selective_checkpointing, {}, default), lambda: obstacle)


def choose_parking(settings: RunSettings, device: torch.device, checkpoints: bool, fuses: bool, needed: int) -> Choice:
    """Whether what gradient checkpointing keeps waits in main memory; by default on CUDA, where there is room for it.

    needed: how many bytes of it. What a resumed run chose does not matter: the numbers are the same either way.
    """
    free = psutil.virtual_memory().available
    if device.type != "cuda":
        obstacle = _NO_CUDA
    elif not checkpoints or not fuses:
        obstacle = f"{'fused_blocks' if checkpoints else 'gradient_checkpointing'} is off"
    else:
        obstacle = None
    fits = obstacle is None and needed <= free // 2
    compared = f"it takes {readable_size(needed)} of the {readable_size(free)} of main memory that are free"
    default = Choice("cpu_offload_checkpointing", fits, obstacle or compared)
    return _if_possible(_wanted(settings.cpu_offload_checkpointing, {}, default), lambda: obstacle)


def attention_choice(asked: str, before: Recorded, found: str) -> Choice:
    """Which attention backend acts, and why.

    found: what was found to work when `attention_wanted` was tried; where it is another, that was warned of.
    """
    wanted = attention_wanted(asked, before)
    source = AS_SET if asked != "auto" else AS_BEFORE
    if wanted == "auto":
        source = "auto, which leaves the kernel to PyTorch"
    elif wanted != found:
        source = f"{wanted}, {source}, does not work here"
    return Choice("anima_attention_backend", found, source)


def attention_wanted(asked: str, before: Recorded) -> str:
    """The backend to try: the one asked for, else that of the resumed run, else auto."""
    then = before.get("anima_attention_backend")
    return then if asked == "auto" and isinstance(then, str) else asked


def _compared(needed: int, memory: StepMemory) -> str:
    return f"the run takes about {readable_size(needed)} of the {readable_size(memory.limit)} that the card has for it"


def _wanted(setting: bool | None, before: Recorded, default: Choice) -> Choice:
    """The setting, else the resumed run's choice, else the default."""
    if setting is not None:
        return Choice(default.name, setting, AS_SET)
    then = before.get(default.name)
    return Choice(default.name, then, AS_BEFORE) if isinstance(then, bool) else default


def _if_possible(wanted: Choice, find_obstacle: Callable[[], str | None]) -> Choice:
    """What is wanted; off, with a warning, where something stands in the way of having it on."""
    obstacle = find_obstacle() if wanted.value else None
    return wanted if obstacle is None else _instead(wanted, False, obstacle)


def _instead(wanted: Choice, value: bool, reason: str) -> Choice:
    """Another value than wanted, with a warning that names both."""
    logger.warning(
        "%s is %s, and not %s (%s): %s", wanted.name, shown(value), shown(wanted.value), wanted.reason, reason
    )
    return Choice(wanted.name, value, reason)
