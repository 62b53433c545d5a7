"""Frozen Linears that share an input, with their LoRAs, as one matrix product forward and one backward.

Of W [out, in] and its LoRA's down A [r, in] and up B [out, r], times alpha / rank, one storage holds

    [[W, B],
     [A, 0]]

so that [x, h] [W, B]ᵀ with h = x Aᵀ is the output, the LoRA's part and all, and [dy, dh] [W; A] with dh = dy B the
gradient of x. For that x and dy come in rooms that have columns left for h and dh. Of an x without room,
x [W; A]ᵀ gives the base output and h at once; the LoRA's part is left to whoever reads it, as a `Sum`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.anima_runtime.block_ops import Sum
from networks.aside import Aside
from networks.lora import LoRA

# Ranks are padded by zeros to multiples of what matrix units take at a time.
_LEAST_RANK = 16
# What is left to readers is multiplied without matrix units: of larger ranks that takes longer than a pass over memory.
_MOST_LATE_RANK = 32


class JointLinear:
    """Linears of one input; adapters: None where one has none. Their weights become views of the joint storage.

    aside: computes the adapters' gradients.
    """

    def __init__(self, linears: Sequence[nn.Linear], adapters: Sequence[LoRA | None], aside: Aside) -> None:
        self._adapters, self._aside = adapters, aside
        self._in = linears[0].in_features
        self._widths = [linear.out_features for linear in linears]
        self._out = sum(self._widths)
        self._starts = [sum(self._widths[:number]) for number in range(len(linears))]
        largest = max((adapter.rank for adapter in adapters if adapter is not None), default=0)
        self._rank = -(-largest // _LEAST_RANK) * _LEAST_RANK
        ranks = self._rank * len(linears)
        weight = linears[0].weight
        self._storage = weight.new_zeros(self._out + ranks, self._in + ranks)
        # Once more, in the order in which kernels that add late read it; None where nothing can be left to them.
        adds_late = len(linears) == 1 and 0 < self._rank <= _MOST_LATE_RANK
        self._up_t = weight.new_zeros(self._rank, self._out) if adds_late else None
        for linear, start in zip(linears, self._starts, strict=True):
            place = self._storage[start : start + linear.out_features, : self._in]
            place.copy_(linear.weight.detach())
            linear.weight.data = place

    def parameters(self) -> list[nn.Parameter]:
        """Of all adapters, in the order of `backward`'s gradients."""
        own = [(adapter.lora_down.weight, adapter.lora_up.weight) for adapter in self._adapters if adapter is not None]
        return [parameter for pair in own for parameter in pair]

    def copies(self) -> list[tuple[Tensor, Tensor, float]]:
        """What must be brought into the storage before `forward`: each adapter weight, its place, and its factor."""
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
        return self._storage.new_empty(count, self._storage.shape[1])[:, : self._in]

    def forward(self, x_NI: Tensor) -> list[Tensor]:
        """Each Linear's output [N, out], of an x from `empty_input`."""
        room = _room(x_NI)
        if self._rank:
            torch.mm(x_NI, self._storage[self._out :, : self._in].t(), out=room[:, self._in :])
        return list((room @ self._storage[: self._out].t()).split(self._widths, dim=1))

    def forward_any(self, x_NI: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Each Linear's output [N, out], of any x, and h."""
        y = x_NI @ self._storage[:, : self._in].t()
        y_NO, hidden_NR = y[:, : self._out], y[:, self._out :]
        if self._rank:
            y_NO.addmm_(hidden_NR, self._storage[: self._out, self._in :].t())
        return list(y_NO.split(self._widths, dim=1)), hidden_NR

    def forward_late(self, x_NI: Tensor) -> tuple[Sum, Tensor | None]:
        """The only Linear's output, of any x, and h."""
        if self._up_t is None:
            (y_NO,), hidden_NR = self.forward_any(x_NI)
            return Sum(y_NO), hidden_NR
        y = x_NI @ self._storage[:, : self._in].t()
        return Sum(y[:, : self._out], y[:, self._out :], self._up_t), y[:, self._out :]

    def empty_gradients(self, count: int) -> list[Tensor]:
        """Where the gradients of each Linear's output go for `backward`: [N, out]."""
        room = self._storage.new_empty(count, self._storage.shape[0])
        return list(room[:, : self._out].split(self._widths, dim=1))

    def backward(
        self, gradients: Sequence[Tensor], x_NI: Tensor, hidden_NR: Tensor | None, wants_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient of x [N, in], if wanted, and those of the parameters, float32; from those of the outputs.

        hidden: h as `forward_any` or `forward_late` gave it; else x is the one that `forward` took, and h beside it.
        Those of the parameters must not be used before `Aside.join`.
        """
        room, found = _room(gradients[0]), []
        if self._rank:
            torch.mm(room[:, : self._out], self._storage[: self._out, self._in :], out=room[:, self._out :])
            hidden_NR = _room(x_NI)[:, self._in :] if hidden_NR is None else hidden_NR
            found = self._aside.run(self._parameter_gradients, room, x_NI, hidden_NR)
        return room @ self._storage[:, : self._in] if wants_input else None, found

    def _parameter_gradients(self, room: Tensor, x_NI: Tensor, hidden_NR: Tensor) -> list[Tensor]:
        dy_NO, dhidden_NR = room[:, : self._out], room[:, self._out :]
        ddown, dup = wide_product(dhidden_NR.t(), x_NI), wide_product(dy_NO.t(), hidden_NR)
        found = []
        for number, adapter in enumerate(self._adapters):
            if adapter is not None:
                ranks = slice(number * self._rank, number * self._rank + adapter.rank)
                # Adding many gradients at once needs all of them in order of memory.
                own = dup[:, ranks].narrow(0, self._starts[number], self._widths[number]).contiguous()
                found += [ddown[ranks], own if adapter.scale == 1 else own * adapter.scale]
        return found

    def _places(self, number: int) -> tuple[Tensor, Tensor]:
        """Where an adapter's down [rank, in] and up [out, rank] lie, with the padding of their ranks."""
        down = self._storage[self._out :, : self._in].narrow(0, number * self._rank, self._rank)
        up = self._storage[: self._out, self._in :].narrow(1, number * self._rank, self._rank)
        return down, up.narrow(0, self._starts[number], self._widths[number])


def _room(first: Tensor) -> Tensor:
    """The whole room, of which a tensor [N, …] has the first columns."""
    return first.as_strided((first.shape[0], first.stride(0)), (first.stride(0), 1))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices, in float32 at least."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    widens = a.is_cuda and hasattr(torch.ops.aten.mm, "dtype")  # since torch 2.8
    return torch.mm(a, b, out_dtype=torch.float32) if widens else (a @ b).float()
