"""Frozen Linears that share an input, with their LoKrs, forward and backward without autograd; as `joint_linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.anima_runtime.block_ops import Sum
from networks.lokr import LoKr, add_kronecker_, kronecker_gradients


class JointLoKr:
    """Linears of one input; adapters: None where one has none. See `JointLinear` for the methods."""

    def __init__(self, linears: Sequence[nn.Linear], adapters: Sequence[LoKr | None]) -> None:
        self._linears = linears
        self._adapters = adapters
        self._factors: list[tuple[Tensor, Tensor] | None] = []

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self._adapters if adapter is not None for parameter in adapter.parameters()]

    def copies(self) -> list[tuple[Tensor, Tensor, float]]:
        return []

    def empty_input(self, count: int) -> Tensor:
        return self._linears[0].weight.new_empty(count, self._linears[0].in_features)

    def forward(self, x_NI: Tensor) -> list[Tensor]:
        dtype, outputs = x_NI.dtype, []
        self._factors = [None if adapter is None else adapter.scaled_factors(dtype) for adapter in self._adapters]
        for linear, factors in zip(self._linears, self._factors, strict=True):
            y_NO = x_NI @ linear.weight.t()
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
                _, *dfactors = kronecker_gradients(dy_NO, x_NI, *factors, wants_input, dx_NI)
                with torch.enable_grad():
                    made = adapter.scaled_factors(factors[0].dtype)
                found += torch.autograd.grad(made, list(adapter.parameters()), dfactors)
        return dx_NI, found
