"""Frozen Linears that share an input, with their LoKrs, forward and backward without autograd; as `joint_linear`.

(w1 ⊗ w2) x is two steps, in the order that leaves less between them: w2's product, by the library's matrix product over
parts of rows, and w1's, which `mixing` does in one pass. What they give goes first to where the output or its gradient
belongs, and the base weights' product is added to it: that reads it while it computes, and rounds the sum once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from library.anima_runtime.block_ops import Sum
from library.anima_runtime.mixing import mix, mix_backward
from networks.joint_linear import joint_bias, wide_product
from networks.lokr import LoKr, w1_goes_first


class _Part(NamedTuple):
    """LoKrs of equal shapes on Linears side by side; the factors in the model's dtype, w1 times the scale.

    start: the first one's first output. w1_first: for a single one whose outputs are all there are.
    """

    adapters: list[LoKr]
    start: int
    w1_MOI: Tensor
    w2_MJK: Tensor
    w1_first: bool


class JointLoKr:
    """Linears of one input; adapters: None where one has none. See `JointLinear` for the methods."""

    def __init__(self, linears: Sequence[nn.Linear], adapters: Sequence[LoKr | None]) -> None:
        self._widths = [linear.out_features for linear in linears]
        self._weight_OI = torch.cat([linear.weight.detach() for linear in linears])
        for linear, place in zip(linears, self._weight_OI.split(self._widths), strict=True):
            linear.weight.data = place
        self._bias_O = joint_bias(linears)
        self._parts = self._join(adapters)
        self._order = [adapter for adapter in adapters if adapter is not None]
        self._covers = len(self._order) == len(linears)

    def _join(self, adapters: Sequence[LoKr | None]) -> list[_Part]:
        runs: list[tuple[int, list[LoKr]]] = []
        start, before = 0, None
        for adapter, width in zip(adapters, self._widths, strict=True):
            if adapter is not None:
                if before is not None and _shapes(before) == _shapes(adapter):
                    runs[-1][1].append(adapter)
                else:
                    runs.append((start, [adapter]))
            start, before = start + width, adapter
        return [self._part(start, own) for start, own in runs]

    def _part(self, start: int, adapters: list[LoKr]) -> _Part:
        w1, w2 = (self._weight_OI.new_empty(len(adapters), *shape) for shape in _shapes(adapters[0]))
        return _Part(adapters, start, w1, w2, len(self._widths) == 1 and w1_goes_first(w1[0], w2[0]))

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self._order for parameter in adapter.parameters()]

    def copies(self) -> list[tuple[Tensor, Tensor, float]]:
        """Whole factors; those that are products are made by `forward`."""
        found = []
        for part in self._parts:
            for adapter, w1, w2 in zip(part.adapters, part.w1_MOI, part.w2_MJK, strict=True):
                if adapter.is_whole:
                    found += [(adapter.lokr_w1, w1, 1.0), (adapter.lokr_w2, w2, 1.0)]
        return found

    def empty_input(self, count: int) -> Tensor:
        return self._weight_OI.new_empty(count, self._weight_OI.shape[1])

    def forward(self, x_NI: Tensor) -> list[Tensor]:
        y_NO = x_NI.new_empty(len(x_NI), len(self._weight_OI))
        if not self._covers:
            y_NO.zero_()
        for part in self._parts:
            _take_low_rank(part)
            _write_outputs(part, x_NI, y_NO)
        y_NO.addmm_(x_NI, self._weight_OI.t())
        if self._bias_O is not None:
            y_NO += self._bias_O
        return list(y_NO.split(self._widths, dim=1))

    def empty_output(self, _count: int) -> None:
        """There is no use for one."""

    def forward_any(self, x_NI: Tensor, _into: None = None) -> tuple[list[Tensor], None]:
        return self.forward(x_NI), None

    def forward_late(self, x_NI: Tensor, _into: None = None) -> tuple[Sum, None]:
        return Sum(self.forward(x_NI)[0]), None

    def empty_gradients(self, count: int) -> list[Tensor]:
        return list(self._weight_OI.new_empty(count, len(self._weight_OI)).split(self._widths, dim=1))

    def backward(
        self, gradients: Sequence[Tensor], x_NI: Tensor, _hidden_NR: Tensor | None, wants_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        dy_NO = gradients[0].as_strided((len(x_NI), len(self._weight_OI)), (len(self._weight_OI), 1))
        dx_NI, found = None, []
        for part in self._parts:
            backward = _backward_w1_first if part.w1_first else _backward_w2_first
            dx_NI, dw1_MOI, dw2_MJK = backward(part, dy_NO, x_NI, dx_NI, wants_input)
            for own in zip(part.adapters, dw1_MOI, dw2_MJK, strict=True):
                found += _through_factors(*own)
        return dx_NI.addmm_(dy_NO, self._weight_OI) if wants_input else None, found


def _shapes(adapter: LoKr) -> tuple[torch.Size, torch.Size]:
    return adapter.w1.shape, adapter.w2.shape


def _take_low_rank(part: _Part) -> None:
    for adapter, *places in zip(part.adapters, part.w1_MOI, part.w2_MJK, strict=True):
        if not adapter.is_whole:
            for place, factor in zip(places, adapter.scaled_factors(part.w1_MOI.dtype), strict=True):
                place.copy_(factor)


def _write_outputs(part: _Part, x_NI: Tensor, y_NO: Tensor) -> None:
    """The part's share of y."""
    (_, o, i), (_, j, k) = part.w1_MOI.shape, part.w2_MJK.shape
    if part.w1_first:
        inner_NOK = x_NI.new_empty(len(x_NI), o, k)
        mix(part.w1_MOI, x_NI.view(1, -1, i, k), inner_NOK[None])
        torch.mm(inner_NOK.view(-1, k), part.w2_MJK[0].t(), out=y_NO.view(-1, j))
    else:
        inner = x_NI.reshape(-1, k) @ part.w2_MJK.view(-1, k).t()
        mix(part.w1_MOI, _members(inner, i, j), _outputs(part, y_NO))


def _backward_w1_first(
    part: _Part, dy_NO: Tensor, x_NI: Tensor, _dx_NI: Tensor | None, _wants_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's share of dx, and the gradients of w1 and w2 [M, …]."""
    (_, o, i), (_, j, k) = part.w1_MOI.shape, part.w2_MJK.shape
    dinner = (dy_NO.view(-1, j) @ part.w2_MJK[0]).view(1, -1, o, k)
    dx_NI, inner = torch.empty_like(x_NI), torch.empty_like(dinner)
    dw1_MOI = mix_backward(part.w1_MOI, dinner, x_NI.view(1, -1, i, k), dx_NI.view(1, -1, i, k), inner)
    return dx_NI, dw1_MOI, wide_product(dy_NO.view(-1, j).t(), inner.view(-1, k))[None]


def _backward_w2_first(
    part: _Part, dy_NO: Tensor, x_NI: Tensor, dx_NI: Tensor | None, wants_input: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """As `_backward_w1_first`; adds to a dx that is there, and has none where it is not wanted."""
    (_, _, i), (_, j, k) = part.w1_MOI.shape, part.w2_MJK.shape
    x, w2 = x_NI.reshape(-1, k), part.w2_MJK.view(-1, k)
    inner = x @ w2.t()
    dinner = torch.empty_like(inner)
    dw1_MOI = mix_backward(part.w1_MOI, _outputs(part, dy_NO), _members(inner, i, j), _members(dinner, i, j))
    if wants_input and dx_NI is None:
        dx_NI = (dinner @ w2).view_as(x_NI)
    elif wants_input:
        dx_NI.view(-1, k).addmm_(dinner, w2)
    return dx_NI, dw1_MOI, wide_product(dinner.t(), x).view_as(part.w2_MJK)


def _members(inner: Tensor, parts: int, width: int) -> Tensor:
    """[N * I, M * J] as [M, N, I, J]."""
    return inner.view(-1, parts, inner.shape[1] // width, width).permute(2, 0, 1, 3)


def _outputs(part: _Part, y_NO: Tensor) -> Tensor:
    """The part's columns of y as [M, N, O, J]."""
    (members, o, _), (_, j, _) = part.w1_MOI.shape, part.w2_MJK.shape
    own = y_NO[:, part.start : part.start + members * o * j]
    return own.unflatten(1, (members, o, j)).transpose(0, 1)


def _through_factors(adapter: LoKr, dw1: Tensor, dw2: Tensor) -> list[Tensor]:
    """The gradients of an adapter's parameters, in their order, from those of the scaled w1 and of w2.

    Of a factor a @ b they are dw bᵀ and aᵀ dw. Frozen parameters get theirs too, which autograd leaves unused.
    """
    found = []
    for name, dw in (("lokr_w1", dw1 if adapter.scale == 1 else dw1 * adapter.scale), ("lokr_w2", dw2)):
        if getattr(adapter, name) is None:
            a, b = getattr(adapter, f"{name}_a"), getattr(adapter, f"{name}_b")
            found += [dw @ b.t(), a.t() @ dw]
        else:
            found.append(dw)
    return found
