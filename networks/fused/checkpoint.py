"""What of a fused block's forward pass is kept for its backward pass, and what is computed again: see `Tape`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.memory.parking import Parked, Parking
from library.anima_runtime.ops.attention_passes import Attended, with_inputs, with_made
from library.anima_runtime.ops.block_ops import Sum
from networks.fused.block import FusedBlock, activated
from networks.fused.tape import MLP, Branch, CrossAttention, Given, Output, SelfAttention


class KeepingTape:
    """Keeps everything."""

    def __init__(self) -> None:
        self._branches: list[Branch] = []

    def keep(self, branch: Branch) -> None:
        self._branches.append(branch)

    def take(self, wants_output: bool) -> Any:
        return self._branches.pop()


class SelectiveTape:
    """Keeps the block's input and what products and attention gave, 14 of 25 tensors of the residual stream's size.

    Of 26 where attention does not norm heads itself. Norms, heads and GELU, passes over memory, are made again.
    """

    def __init__(self, fused: FusedBlock, given: Given) -> None:
        self._fused, self._given = fused, given
        self._x_BLD: Tensor | None = None
        self._kept: list[Branch] = []
        self._restored: list[Branch] = []

    def keep(self, branch: Branch) -> None:
        if isinstance(branch, SelfAttention):
            self._x_BLD = branch.x_BLD
        if isinstance(branch, MLP):
            branch = branch._replace(activated=None)
            if not self._given.trains_modulations:
                branch = branch._replace(output=Output(None, _alone(branch.output.hidden_NR)))
        else:
            branch = branch._replace(attended=branch.attended._replace(inputs=None))
        self._kept.append(branch._replace(x_BLD=None, normed=None))

    def take(self, wants_output: bool) -> Any:
        if self._kept:
            self._restore()
        return self._restored.pop()

    def _restore(self) -> None:
        fused, given, x_BLD, former = self._fused, self._given, self._x_BLD, None
        for number, branch in enumerate(self._kept):
            x_BLD, normed = fused.begin(number, x_BLD, former, given)
            fused.entries[number].complete_input(normed.normed_ND)
            if isinstance(branch, MLP):
                inside = {"activated": activated(branch.wide)}
            else:
                heads = fused.heads_of(branch, given, len(x_BLD))
                inside = {"attended": with_inputs(branch.attended, *heads)}
            self._restored.append(branch._replace(x_BLD=x_BLD, normed=normed, **inside))
            former = branch.output.branch
        self._x_BLD, self._kept = None, []


class RecomputingTape:
    """Keeps the block's input and computes the rest again, but for the MLP's last product where nobody asks for it."""

    def __init__(self, fused: FusedBlock, given: Given) -> None:
        self._fused, self._given = fused, given
        self._x_BLD: Tensor | None = None
        self._hidden_NR: Tensor | None = None
        self._again: KeepingTape | None = None

    def keep(self, branch: Branch) -> None:
        if isinstance(branch, SelfAttention):
            self._x_BLD = branch.x_BLD
        if isinstance(branch, MLP):
            self._hidden_NR = _alone(branch.output.hidden_NR)

    def take(self, wants_output: bool) -> Any:
        if self._again is not None:
            return self._again.take(wants_output)
        fused, given, x_BLD, former = self._fused, self._given, self._x_BLD, None
        self._x_BLD, self._again = None, KeepingTape()
        for number in range(2):
            x_BLD, former = fused.run(number, x_BLD, former, given, self._again)
        last = fused.run_inside(2, *fused.begin(2, x_BLD, former, given), given)
        output = fused.output_of(last) if wants_output else Output(None, self._hidden_NR)
        return last._replace(output=output)


class _OutputAway(NamedTuple):
    """An output whose numbers are parked: base and hidden side by side, of which the first `width` are base's."""

    parked: list[Parked]
    width: int
    weight_RK: Tensor | None
    hidden_width: int


class ParkingTape:
    """Has three tensors of the residual stream's size parked, and computes the rest again.

    These are the block's input; what self-attention gave, if a kernel computed it that can go on from there; and what
    the last product gave, if the gate's gradient is wanted. For what they take, self-attention and that product take
    longest to compute again: 0.21 and 0.18 ms of an H200 at 4096 tokens, other products 0.05 for each such tensor.

    At 1024² they are 79 MB for each TFLOP of the forward pass. Lest it waits, a card that reaches so many TFLOP/s needs
    0.08 GB/s of the bus for each: 46 of 55 on an H200; one that reaches 130 needs 10, of about 25 that sixteen lanes of
    PCIe 4 move.

    Self-attention's queries, keys and values are computed again last, when the other branches are done with.
    """

    def __init__(self, fused: FusedBlock, given: Given, parking: Parking, stays: bool) -> None:
        """stays: whether what is kept is wanted at once, and stays where it is."""
        self._fused, self._given, self._parking, self._stays = fused, given, parking, stays
        self._parked_x: list[Parked] = []
        self._attended: Attended | None = None
        self._last: _OutputAway | None = None
        self._hidden_NR: Tensor | None = None
        self._branches: list[CrossAttention | SelfAttention] = []

    def keep(self, branch: Branch) -> None:
        if isinstance(branch, SelfAttention):
            self._parked_x = self._leave([branch.x_BLD, *branch.attended.made])
            if branch.attended.made:
                self._attended = branch.attended._replace(inputs=None, output=None, made=())
        if isinstance(branch, MLP):
            if self._given.trains_modulations:
                self._last = self._away(branch.output)
            else:
                self._hidden_NR = _alone(branch.output.hidden_NR)
            if self._stays:
                # The backward pass begins, which takes most memory; what former blocks left is wanted after this one.
                self._parking.settle()

    def take(self, wants_output: bool) -> Any:
        if not self._branches:
            return self._run_again(wants_output)
        branch = self._branches.pop()
        if isinstance(branch, CrossAttention):
            # The block before has parked as many as this one; they come while the rest of this one is at work.
            self._parking.expect(1 + (self._attended is not None) + (self._last is not None))
            return branch
        return branch if self._attended is None else self._with_heads(branch)

    def _run_again(self, wants_output: bool) -> MLP:
        """All branches, but self-attention where its result was parked."""
        fused, given = self._fused, self._given
        x_BLD, *made = self._parking.take(self._parked_x)
        if self._attended is None:
            x_BLD, normed = fused.begin(0, x_BLD, None, given)
            first = fused.run_inside(0, x_BLD, normed, given)
        else:
            attended = with_made(self._attended, tuple(made), len(x_BLD))
            first = SelfAttention(x_BLD, None, [], attended)
        first = first._replace(output=fused.output_of(first))
        second = fused.run_inside(1, *fused.begin(1, x_BLD, first.output.branch, given), given)
        second = second._replace(output=fused.output_of(second))
        self._branches = [first, second]
        last = fused.run_inside(2, *fused.begin(2, second.x_BLD, second.output.branch, given), given)
        return last._replace(output=self._last_output(last, wants_output))

    def _with_heads(self, branch: SelfAttention) -> SelfAttention:
        """The first branch with what was left out of it."""
        _, normed = self._fused.begin(0, branch.x_BLD, None, self._given)
        qkv = self._fused.qkv.forward(normed.normed_ND)
        heads = self._fused.self_heads(qkv, self._given, len(branch.x_BLD))
        return branch._replace(normed=normed, qkv=qkv, attended=with_inputs(branch.attended, *heads))

    def _last_output(self, last: MLP, wants_output: bool) -> Output:
        if self._last is None:
            return self._fused.output_of(last) if wants_output else Output(None, self._hidden_NR)
        parked, width, weight_RK, hidden_width = self._last
        (room,) = self._parking.take(parked)
        hidden_NR = room[:, width:] if hidden_width else None
        # The room may go when the gate has been passed.
        return Output(Sum(room[:, :width], None if weight_RK is None else hidden_NR, weight_RK), _alone(hidden_NR))

    def _away(self, output: Output) -> _OutputAway:
        base_NK, _, weight_RK = output.branch
        room = base_NK.as_strided((len(base_NK), base_NK.stride(0)), base_NK.stride())
        return _OutputAway(self._leave([room]), base_NK.shape[1], weight_RK, room.shape[1] - base_NK.shape[1])

    def _leave(self, tensors: Sequence[Tensor]) -> list[Parked]:
        return [Parked(tensor) for tensor in tensors] if self._stays else self._parking.leave(tensors)


def parked_bytes(config: AnimaConfig, tokens: int, dtype: torch.dtype) -> int:
    """How much main memory `ParkingTape` takes for a batch of so many tokens."""
    return 3 * config.depth * tokens * config.width * dtype.itemsize


def _alone(hidden_NR: Tensor | None) -> Tensor | None:
    """A copy that does not keep the product alive of which it is some columns."""
    return None if hidden_NR is None else hidden_NR.clone()
