"""Frozen Linears that share an input, with their LoRAs, as one matrix product forward and one backward.

W [out, in] has its LoRA's down A [r, in] and up B [out, r], times alpha / rank, beside it in memory, see
`joined_weights`, so that [x, h] [W, B]ᵀ with h = x Aᵀ is the output, the LoRA's part and all, and [dy, dh] [W; A] with
dh = dy B the gradient of x. For that x and dy come in rooms that have columns left for h and dh. Of an x without room,
x [W; A]ᵀ gives the base output and h at once; the LoRA's part is left to whoever reads it, as a `Sum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.anima_runtime.memory.weight_swap import SwappedBlock
from library.anima_runtime.ops.block_ops import Sum
from library.anima_runtime.ops.kernels import kernels_of
from networks.fused.joined_weights import joined_weights
from networks.lora import LoRA

# Ranks are padded by zeros to multiples of what matrix units take at a time.
_LEAST_RANK = 16
# What is left to readers is multiplied without matrix units: of larger ranks that takes longer than a pass over memory
# does (40 instead of 20 + 18 µs of a 2048 x 2048 output of 4096 tokens at rank 32).
_MOST_LATE_RANK = 16


class Passed(NamedTuple):
    """What the gradients of a joint's parameters are made of: the outputs' gradients with dh beside them, x, and h."""

    room: Tensor
    x_NI: Tensor
    hidden_NR: Tensor | None


class JointLinear:
    """Linears of one input and one width; adapters: None where one has none. swapped: their block, if it is.

    Biases, which all have or none, are added to the outputs.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], adapters: Sequence[LoRA | None], swapped: SwappedBlock | None = None
    ) -> None:
        self._adapters = adapters
        self._in = linears[0].in_features
        self._width = linears[0].out_features
        self._out = self._width * len(linears)
        largest = max((adapter.rank for adapter in adapters if adapter is not None), default=0)
        self._rank = -(-largest // _LEAST_RANK) * _LEAST_RANK
        self._ranks = self._rank * len(linears)
        self._weights = joined_weights(linears, self._ranks, swapped)
        self._up_OR, self._down_RI = self._weights.up_OR, self._weights.down_RI
        # Once more, in the order in which kernels that add late read it; None where nothing can be left to them.
        adds_late = len(linears) == 1 and 0 < self._rank <= _MOST_LATE_RANK
        self._up_t = self._up_OR.new_zeros(self._rank, self._out) if adds_late else None
        self._bias = joint_bias(linears, self._ranks)

    def parameters(self) -> list[nn.Parameter]:
        """Of all adapters, in the order of `backward`'s gradients."""
        own = [(adapter.lora_down.weight, adapter.lora_up.weight) for adapter in self._adapters if adapter is not None]
        return [parameter for pair in own for parameter in pair]

    def copies(self) -> list[tuple[Tensor, Tensor, float]]:
        """What must be brought beside the weights before `forward`: each adapter weight, its place, and its factor."""
        found = []
        for number, adapter in enumerate(self._adapters):
            if adapter is not None:
                down, up = (place.narrow(dim, 0, adapter.rank) for dim, place in enumerate(self._places(number)))
                found += [(adapter.lora_down.weight, down, 1.0), (adapter.lora_up.weight, up, adapter.scale)]
                if self._up_t is not None:
                    found.append((adapter.lora_up.weight, self._up_t[: adapter.rank].t(), adapter.scale))
        return found

    def empty_input(self, count: int) -> Tensor:
        """Where x goes for `forward`: [N, in]."""
        return self._up_OR.new_empty(count, self._in + self._ranks)[:, : self._in]

    def complete_input(self, x_NI: Tensor) -> Tensor:
        """Puts h beside an x from `empty_input`, for `backward`; returns both, [N, in + ranks]."""
        room = _room(x_NI)
        if self._rank:
            torch.mm(x_NI, self._down_RI.t(), out=room[:, self._in :])
        return room

    def forward(self, x_NI: Tensor) -> list[Tensor]:
        """Each Linear's output [N, out], of an x from `empty_input`."""
        room = self.complete_input(x_NI)
        bias = None if self._bias is None else self._bias[: self._out]
        y_NO = F.linear(room, self._weights.whole()[: self._out], bias)
        return list(y_NO.split(self._width, dim=1))

    def empty_output(self, count: int) -> Tensor:
        """Where `forward_any` and `forward_late` may put y and h: [N, out + ranks]."""
        return self._up_OR.new_empty(count, self._out + self._ranks)

    def forward_any(self, x_NI: Tensor, into: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Each Linear's output [N, out], of any x, and h."""
        y = self._product(x_NI, into)
        y_NO, hidden_NR = y[:, : self._out], y[:, self._out :]
        if self._rank:
            y_NO.addmm_(hidden_NR, self._up_OR.t())
        return list(y_NO.split(self._width, dim=1)), hidden_NR

    def forward_late(self, x_NI: Tensor, into: Tensor | None = None) -> tuple[Sum, Tensor | None]:
        """The only Linear's output, of any x, and h."""
        if self._up_t is None:
            (y_NO,), hidden_NR = self.forward_any(x_NI, into)
            return Sum(y_NO), hidden_NR
        y = self._product(x_NI, into)
        return Sum(y[:, : self._out], y[:, self._out :], self._up_t), y[:, self._out :]

    def empty_gradients(self, count: int) -> list[Tensor]:
        """Where the gradients of each Linear's output go for `backward`: [N, out]."""
        return list(self.empty_output(count)[:, : self._out].split(self._width, dim=1))

    def backward(
        self, gradients: Sequence[Tensor], x_NI: Tensor, hidden_NR: Tensor | None, wants_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of x [N, in], if wanted, and those of the parameters, float32; from those of the outputs.

        hidden: h as `forward_any` or `forward_late` gave it; else x is the one that `forward` took, and h beside it.
        """
        passed = self.pass_hidden(gradients, x_NI, hidden_NR)
        return self.input_gradient(passed) if wants_input else None, self._parameter_gradients(passed)

    def _parameter_gradients(self, passed: Passed) -> list[Tensor]:
        """What `parameter_gradients` gives, by one kernel where that takes them."""
        sizes = self._width, self._in, self._rank, len(self._adapters)
        if not (self._rank and passed.x_NI.is_cuda and kernels_of("low_rank").suits(*sizes)):
            (found,) = parameter_gradients([self], [passed])
            return found
        dy_NO, dhidden_NR = passed.room[:, : self._out], passed.room[:, self._out :]
        dup_OR, ddown_RI = kernels_of("low_rank").factor_gradients(
            dy_NO, passed.hidden_NR, passed.x_NI, dhidden_NR, len(self._adapters)
        )
        return self.cut(ddown_RI, dup_OR.split(self._width))

    def pass_hidden(self, gradients: Sequence[Tensor], x_NI: Tensor, hidden_NR: Tensor | None) -> Passed:
        """`backward` as far as dh, for `input_gradient` and `parameter_gradients`."""
        room = _room(gradients[0])
        if self._rank:
            torch.mm(room[:, : self._out], self._up_OR, out=room[:, self._out :])
            hidden_NR = _room(x_NI)[:, self._in :] if hidden_NR is None else hidden_NR
        return Passed(room, x_NI, hidden_NR)

    def input_gradient(self, passed: Passed) -> Tensor:
        """That of x [N, in]."""
        return passed.room @ self._weights.whole()[:, : self._in]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Joints of the same ones are alike."""
        return self._out, self._in, self._rank, self._width

    def factors(self, passed: Passed) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """dh [ranks, N] and x [N, in], whose product is the gradient of A, and each Linear's dy [out, N] and h [N, r],
        whose products are those of B; None without adapters."""
        if not self._rank:
            return None
        outputs = passed.room[:, : self._out].t().split(self._width)
        return passed.room[:, self._out :].t(), passed.x_NI, outputs, passed.hidden_NR.split(self._rank, dim=1)

    def cut(self, ddown_RI: Tensor, dups: Sequence[Tensor]) -> list[Tensor]:
        """The parameters' gradients, from those of A and B with the padding of their ranks."""
        found = []
        for adapter, ddown, dup in zip(self._adapters, ddown_RI.split(self._rank), dups, strict=True):
            if adapter is not None:
                # Adding many gradients at once needs all of them in order of memory.
                own = dup[:, : adapter.rank].contiguous()
                found += [ddown[: adapter.rank], own if adapter.scale == 1 else own * adapter.scale]
        return found

    def _product(self, x_NI: Tensor, into: Tensor | None) -> Tensor:
        """y and h, which biases do not reach, side by side."""
        weight_IO = self._weights.whole()[:, : self._in].t()
        if self._bias is None:
            return torch.mm(x_NI, weight_IO, out=into)
        return torch.addmm(self._bias, x_NI, weight_IO, out=into)

    def _places(self, number: int) -> tuple[Tensor, Tensor]:
        """Where an adapter's down [rank, in] and up [out, rank] lie, with the padding of their ranks."""
        up = self._up_OR.narrow(1, number * self._rank, self._rank)
        return self._down_RI.narrow(0, number * self._rank, self._rank), up.narrow(0, number * self._width, self._width)


def parameter_gradients(joints: Sequence[JointLinear], passes: Sequence[Passed]) -> list[list[Tensor]]:
    """Those of each joint's parameters, float32, in their order, from what its `pass_hidden` gave.

    Of joints of as many Linears each. What lies evenly apart in memory is multiplied at once.
    """
    factors = [joint.factors(passed) for joint, passed in zip(joints, passes, strict=True)]
    there = [each for each in factors if each is not None]
    if not there:
        return [[] for _ in joints]
    ddowns = iter(_products([(dhidden, x) for dhidden, x, _, _ in there]))
    members = [[(dys[number], hs[number]) for _, _, dys, hs in there] for number in range(len(there[0][2]))]
    if len(there) == 1:
        dups = iter([_products([member for (member,) in members])])
    else:
        dups = zip(*(_products(member) for member in members), strict=True)
    return [
        [] if own is None else joint.cut(next(ddowns), next(dups)) for joint, own in zip(joints, factors, strict=True)
    ]


def _products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """The product of each pair, by one batched product where that works."""
    lefts, rights = (_evenly_apart(side) for side in zip(*pairs, strict=True))
    if lefts is None or rights is None:
        return [wide_product(left, right) for left, right in pairs]
    return wide_product(lefts, rights).unbind()


def _evenly_apart(matrices: Sequence[Tensor]) -> Tensor | None:
    """Several matrices as a batch, if they lie so in one memory."""
    first = matrices[0]
    places = [matrix.storage_offset() for matrix in matrices]
    steps = {after - before for before, after in pairwise(places)}
    kinds = {(matrix.untyped_storage().data_ptr(), matrix.shape, matrix.stride()) for matrix in matrices}
    if len(steps) != 1 or len(kinds) != 1 or min(steps) < 0:
        return None
    return first.as_strided((len(matrices), *first.shape), (min(steps), *first.stride()))


def joint_bias(linears: Sequence[nn.Linear], ranks: int = 0) -> Tensor | None:
    """The biases, and zeros for the ranks, in one: [out + ranks]; None where there are none."""
    if linears[0].bias is None:
        return None
    biases = [linear.bias.detach() for linear in linears]
    return torch.cat([*biases, biases[0].new_zeros(ranks)])


def _room(first: Tensor) -> Tensor:
    """The whole room, of which a tensor [N, …] has the first columns."""
    return first.as_strided((first.shape[0], first.stride(0)), (first.stride(0), 1))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices or batches of them, in float32 at least."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    widens = a.is_cuda and hasattr(torch.ops.aten.mm, "dtype")  # since torch 2.8
    if not widens:
        return (a @ b).float()
    return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
