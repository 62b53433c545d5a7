"""Frozen Linears that share an input, with their LoKrs, forward and backward without autograd; as `joint_linear`.

W + w1 ⊗ w2 is written out for each product and forgotten: that moves the weights once, where adding (w1 ⊗ w2) x to W x
moves activations several times: for 2048 x 2048 and 4096 tokens 16 MiB instead of 64 and more. Gradients come from the
factors: w2's product over parts of rows, and one pass that mixes the parts by w1 and has its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from library.anima_runtime.memory.weight_swap import SwappedBlock
from library.anima_runtime.ops.block_ops import Sum
from library.anima_runtime.ops.mixing import merge, mix
from networks.fused.joined_weights import joined_weights
from networks.fused.joint_linear import joint_bias, wide_product
from networks.lokr import LoKr


class _Part(NamedTuple):
    """LoKrs of equal shapes on Linears side by side; the factors in the model's dtype, w1 times the scale.

    rows: those of the weights.
    """

    adapters: list[LoKr]
    rows: slice
    w1_MOI: Tensor
    w2_MJK: Tensor


class JointLoKr:
    """Linears of one input; adapters: None where one has none. See `JointLinear` for these and the methods."""

    def __init__(
        self, linears: Sequence[nn.Linear], adapters: Sequence[LoKr | None], swapped: SwappedBlock | None = None
    ) -> None:
        self._widths = [linear.out_features for linear in linears]
        self._out, self._in = sum(self._widths), linears[0].in_features
        self._weights = joined_weights(linears, 0, swapped)
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
        w1, w2 = (self._new_empty(len(adapters), *shape) for shape in _shapes(adapters[0]))
        return _Part(adapters, slice(start, start + w1.shape[0] * w1.shape[1] * w2.shape[1]), w1, w2)

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
        return self._new_empty(count, self._in)

    def complete_input(self, x_NI: Tensor) -> Tensor:
        return x_NI

    def forward(self, x_NI: Tensor) -> list[Tensor]:
        for part in self._parts:
            _take_low_rank(part)
        weight_IO = self._merged_OI().t()
        y_NO = x_NI @ weight_IO if self._bias_O is None else torch.addmm(self._bias_O, x_NI, weight_IO)
        return list(y_NO.split(self._widths, dim=1))

    def empty_output(self, _count: int) -> None:
        """There is no use for one."""

    def forward_any(self, x_NI: Tensor, _into: None = None) -> tuple[list[Tensor], None]:
        return self.forward(x_NI), None

    def forward_late(self, x_NI: Tensor, _into: None = None) -> tuple[Sum, None]:
        return Sum(self.forward(x_NI)[0]), None

    def empty_gradients(self, count: int) -> list[Tensor]:
        return list(self._new_empty(count, self._out).split(self._widths, dim=1))

    def backward(
        self, gradients: Sequence[Tensor], x_NI: Tensor, _hidden_NR: Tensor | None, wants_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        dy_NO = gradients[0].as_strided((len(x_NI), self._out), (self._out, 1))
        found = []
        for part in self._parts:
            for own in zip(part.adapters, *_factor_gradients(part, dy_NO[:, part.rows], x_NI), strict=True):
                found += _through_factors(*own)
        return dy_NO @ self._merged_OI() if wants_input else None, found

    def _merged_OI(self) -> Tensor:
        """The weights with what the adapters add."""
        weight_OI = self._weights.whole()
        merged_OI = torch.empty_like(weight_OI) if self._covers else weight_OI.clone()
        for part in self._parts:
            merge(weight_OI[part.rows], part.w1_MOI, part.w2_MJK, merged_OI[part.rows])
        return merged_OI

    def _new_empty(self, *shape: int) -> Tensor:
        return self._weights.up_OR.new_empty(shape)


def _shapes(adapter: LoKr) -> tuple[torch.Size, torch.Size]:
    return adapter.w1.shape, adapter.w2.shape


def _take_low_rank(part: _Part) -> None:
    for adapter, *places in zip(part.adapters, part.w1_MOI, part.w2_MJK, strict=True):
        if not adapter.is_whole:
            for place, factor in zip(places, adapter.scaled_factors(part.w1_MOI.dtype), strict=True):
                place.copy_(factor)


def _factor_gradients(part: _Part, dy_NO: Tensor, x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Those of w1 [M, O, I] and w2 [M, J, K].

    With X and dY a token's parts as matrices [I, K] and [O, J], they are dY w2 Xᵀ = dY (X w2ᵀ)ᵀ, and
    dYᵀ (w1 X) = (w1ᵀ dY)ᵀ X: of both the form that has the smaller matrix between the products.
    """
    (members, o, i), (_, j, k) = part.w1_MOI.shape, part.w2_MJK.shape
    x_MNIK = x_NI.view(1, -1, i, k)
    if members == 1 and dy_NO.is_contiguous() and o * k <= i * j:
        dproduct = (dy_NO.view(-1, j) @ part.w2_MJK[0]).view(1, -1, o, k)
        mixed = torch.empty_like(dproduct)
        dw1_MOI = mix(part.w1_MOI, dproduct, x_MNIK, mixed)
        return dw1_MOI, wide_product(dy_NO.view(-1, j).t(), mixed.view(-1, k))[None]
    product = x_NI.reshape(-1, k) @ part.w2_MJK.view(-1, k).t()  # of all members side by side
    dproduct = torch.empty_like(product)
    product_MNIJ, dproduct_MNIJ = (each.view(-1, i, members, j).permute(2, 0, 1, 3) for each in (product, dproduct))
    dy_MNOJ = dy_NO.unflatten(1, (members, o, j)).transpose(0, 1)
    dw1_MIO = mix(part.w1_MOI.transpose(1, 2), product_MNIJ, dy_MNOJ, dproduct_MNIJ)
    return dw1_MIO.transpose(1, 2), wide_product(dproduct.t(), x_NI.reshape(-1, k)).view_as(part.w2_MJK)


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
