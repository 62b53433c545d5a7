"""Frozen Linears that share an input, with their LoRAs, as one matrix product forward and two backward.

Of W [out, in] and its LoRA's down A [r, in] and up B [out, r], times alpha / rank, one storage holds

    [[W, B],
     [A, 0]]

so that x [W; A]ᵀ gives the base output and the rank activations at once, and dy [W, B] both their gradients. What the
LoRA adds to either is left to whoever reads it, as a `Sum`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.anima_runtime.block_ops import Sum
from networks.lora import LoRA

# Ranks are padded by zeros to multiples of what matrix units take at a time.
_LEAST_RANK = 16


class JointLinear:
    """Linears of one input; adapters: None where one has none. Their weights become views of the joint storage."""

    def __init__(self, linears: Sequence[nn.Linear], adapters: Sequence[LoRA | None]) -> None:
        self.adapters = adapters
        self.in_features = linears[0].in_features
        widths = [linear.out_features for linear in linears]
        self.out_features = sum(widths)
        self.starts = [sum(widths[:number]) for number in range(len(widths))]
        self.widths = widths
        largest = max((adapter.rank for adapter in adapters if adapter is not None), default=0)
        self.rank = _padded(largest)
        self.joint_rank = _padded(self.rank * len(linears))
        weight = linears[0].weight
        self.up_t = weight.new_zeros(self.rank, self.out_features)
        self.storage = weight.new_zeros(self.out_features + self.joint_rank, self.in_features + self.joint_rank)
        for linear, start in zip(linears, self.starts, strict=True):
            place = self.storage[start : start + linear.out_features, : self.in_features]
            place.copy_(linear.weight.detach())
            linear.weight.data = place

    def parameters(self) -> list[nn.Parameter]:
        """Of all adapters, in the order of `backward`'s gradients."""
        own = [(adapter.lora_down.weight, adapter.lora_up.weight) for adapter in self.adapters if adapter is not None]
        return [parameter for pair in own for parameter in pair]

    def copies(self) -> list[tuple[Tensor, Tensor, float]]:
        """What must be brought into the storage before `forward`: each adapter weight, its place, and its factor."""
        found = []
        for number, adapter in enumerate(self.adapters):
            if adapter is not None:
                down, up = self._places(number, adapter.rank)
                up_t = self.up_t[: adapter.rank, self.starts[number] :][:, : self.widths[number]]
                found += [
                    (adapter.lora_down.weight, down, 1.0),
                    (adapter.lora_up.weight, up, adapter.scale),
                    (adapter.lora_up.weight, up_t.t(), adapter.scale),
                ]
        return found

    def forward(self, x_NI: Tensor) -> list[Sum]:
        """Each Linear's output, with its adapter."""
        y = x_NI @ self.storage[:, : self.in_features].t()
        sums = []
        for number, (start, width) in enumerate(zip(self.starts, self.widths, strict=True)):
            base = y[:, start : start + width]
            if self.adapters[number] is None:
                sums.append(Sum(base))
                continue
            first = number * self.rank
            hidden = y[:, self.out_features + first : self.out_features + first + self.rank]
            sums.append(Sum(base, hidden, self.up_t[:, start : start + width]))
        return sums

    def empty_gradients(self, count: int) -> list[Tensor]:
        """Where the gradients of each Linear's output go, [N, out] each, for `backward`."""
        return list(self.storage.new_empty(count, self.out_features).split(self.widths, dim=1))

    def backward(
        self, gradients: Sequence[Tensor], x_NI: Tensor, outputs: Sequence[Sum], wants_input: bool
    ) -> tuple[Sum | None, list[Tensor]]:
        """The gradient of x, if wanted, and those of the parameters, float32; from those of the outputs."""
        joint = torch.as_strided(gradients[0], (len(x_NI), self.out_features), (self.out_features, 1))
        if not wants_input and self.joint_rank == 0:
            return None, []
        first = 0 if wants_input else self.in_features
        dx = joint @ self.storage[: self.out_features, first:]
        dhidden = dx[:, self.in_features - first :]
        found = []
        for number, adapter in enumerate(self.adapters):
            if adapter is None:
                continue
            own = slice(number * self.rank, number * self.rank + adapter.rank)
            ddown = _product(dhidden[:, own].t(), x_NI)
            dup = _product(gradients[number].t(), outputs[number].hidden_NR[:, : adapter.rank])
            found += [ddown, dup if adapter.scale == 1 else dup * adapter.scale]
        if not wants_input:
            return None, found
        if self.joint_rank == 0:
            return Sum(dx), found
        return Sum(dx[:, : self.in_features], dhidden, self.storage[self.out_features :, : self.in_features]), found

    def _places(self, number: int, rank: int) -> tuple[Tensor, Tensor]:
        """Where an adapter's down [rank, in] and up [out, rank] lie."""
        start, first = self.starts[number], number * self.rank
        down = self.storage[self.out_features + first : self.out_features + first + rank, : self.in_features]
        up = self.storage[
            start : start + self.widths[number], self.in_features + first : self.in_features + first + rank
        ]
        return down, up


def _padded(rank: int) -> int:
    """The rank that is computed with."""
    return -(-rank // _LEAST_RANK) * _LEAST_RANK


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 at least."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    widens = a.is_cuda and hasattr(torch.ops.aten.mm, "dtype")  # since torch 2.8
    return torch.mm(a, b, out_dtype=torch.float32) if widens else (a @ b).float()
