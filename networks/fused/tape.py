"""What a fused block is given, and what its branches leave for its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from library.anima_runtime.attention import RotaryTables
from library.anima_runtime.ops.attention_passes import Attended
from library.anima_runtime.ops.block_ops import Modulation, Normed, Sum
from networks.fused.context import ContextHeads


class Given(NamedTuple):
    """What a block takes beside the residual stream.

    modulations: shift, scale and gate (B, 3 D) of each branch, those that all branches share added. context: its keys
    and values. zero_rows: how many rows of the context are zero and not there.
    """

    modulations: Sequence[Tensor]
    context: ContextHeads
    rotary: RotaryTables
    zero_rows: int

    @property
    def trains_modulations(self) -> bool:
        """Whether gradients of modulations are wanted, which need what the branches gave to their gates."""
        return any(modulation.requires_grad for modulation in self.modulations)

    def parts(self, number: int) -> tuple[Modulation, Tensor]:
        """Shift and scale of a branch, counted from 0, and its gate."""
        shift, scale, gate = self.modulations[number].chunk(3, dim=1)
        return Modulation(shift, scale), gate


class Output(NamedTuple):
    """What a branch's last Linear gives to the gate, None if not known, and what its LoRA made of the input, if any."""

    branch: Sum | None = None
    hidden_NR: Tensor | None = None


class SelfAttention(NamedTuple):
    """What the first branch leaves for the backward pass. x: the residual stream before the branch."""

    x_BLD: Tensor
    normed: Normed
    qkv: list[Tensor]
    attended: Attended
    output: Output = Output()


class CrossAttention(NamedTuple):
    """The same of the second."""

    x_BLD: Tensor
    normed: Normed
    q: list[Tensor]
    attended: Attended
    output: Output = Output()


class MLP(NamedTuple):
    """The same of the third."""

    x_BLD: Tensor
    normed: Normed
    wide: list[Tensor]
    activated: Tensor
    output: Output = Output()


Branch = SelfAttention | CrossAttention | MLP


class Tape(Protocol):
    """Has what the branches leave, from the first to the last, and gives it back from the last to the first."""

    def keep(self, branch: Branch) -> None:
        """Takes what a branch leaves, all of it known."""

    def take(self, wants_output: bool) -> Any:
        """What the last branch left that was not yet taken. wants_output: whether `output.branch` must be known."""
