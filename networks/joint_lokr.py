"""Frozen Linears that share an input, with their LoKrs, forward and backward without autograd; as `joint_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from library.anima_runtime.block_ops import Sum, contracted
from networks.joint_linear import wide_product
from networks.lokr import GROUPED_SIDE, LoKr, add_kronecker_, kronecker_gradients


class _Factors(NamedTuple):
    """An adapter's w1, times its scale, and w2 in the model's dtype; w1 for several rows side by side, see `lokr`."""

    w1: Tensor
    w2: Tensor
    g1: Tensor | None


class JointLoKr:
    """Linears of one input; adapters: None where one has none. See `JointLinear` for the methods."""

    def __init__(self, linears: Sequence[nn.Linear], adapters: Sequence[LoKr | None]) -> None:
        self._linears = linears
        self._adapters = adapters
        self._factors = [
            self._places(adapter) if adapter is not None and adapter.is_whole else None for adapter in adapters
        ]

    def _places(self, adapter: LoKr) -> _Factors:
        """Where `copies` brings whole factors."""
        weight, beside = self._linears[0].weight, max(1, GROUPED_SIDE // max(adapter.w1.shape))
        sides = (side * beside for side in adapter.w1.shape)
        return _Factors(
            weight.new_empty(adapter.w1.shape), weight.new_empty(adapter.w2.shape), weight.new_zeros(*sides)
        )

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self._adapters if adapter is not None for parameter in adapter.parameters()]

    def copies(self) -> list[tuple[Tensor, Tensor, float]]:
        found = []
        for adapter, factors in zip(self._adapters, self._factors, strict=True):
            if adapter is not None and adapter.is_whole:
                rows, columns = factors.w1.shape
                blocks = (
                    factors.g1[first * rows : (first + 1) * rows, first * columns : (first + 1) * columns]
                    for first in range(len(factors.g1) // rows)
                )
                found += [(adapter.lokr_w1, place, 1.0) for place in (factors.w1, *blocks)]
                found.append((adapter.lokr_w2, factors.w2, 1.0))
        return found

    def empty_input(self, count: int) -> Tensor:
        return self._linears[0].weight.new_empty(count, self._linears[0].in_features)

    def forward(self, x_NI: Tensor) -> list[Tensor]:
        outputs = []
        for number, (linear, adapter) in enumerate(zip(self._linears, self._adapters, strict=True)):
            if adapter is not None and not adapter.is_whole:
                self._factors[number] = _Factors(*adapter.scaled_factors(x_NI.dtype), None)
            y_NO = x_NI @ linear.weight.t()
            factors = self._factors[number]
            outputs.append(y_NO if factors is None else add_kronecker_(y_NO, x_NI, *factors))
        return outputs

    def forward_any(self, x_NI: Tensor) -> tuple[list[Tensor], None]:
        return self.forward(x_NI), None

    def forward_late(self, x_NI: Tensor) -> tuple[Sum, None]:
        return Sum(self.forward(x_NI)[0]), None

    def empty_gradients(self, count: int) -> list[Tensor]:
        return [linear.weight.new_empty(count, linear.out_features) for linear in self._linears]

    def backward(
        self, gradients: Sequence[Tensor], x_NI: Tensor, _hidden_NR: Tensor | None, wants_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        dx_NI, found = None, []
        for linear, adapter, factors, dy_NO in zip(
            self._linears, self._adapters, self._factors, gradients, strict=True
        ):
            if wants_input:
                dx_NI = dy_NO @ linear.weight if dx_NI is None else dx_NI.addmm_(dy_NO, linear.weight)
            if adapter is not None:
                _, *dfactors = kronecker_gradients(
                    dy_NO, x_NI, factors.w1, factors.w2, wants_input, dx_NI, factors.g1, wide_product, contracted
                )
                found += _through_factors(adapter, *dfactors)
        return dx_NI, found


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
