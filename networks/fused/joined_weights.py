"""The frozen weights of Linears that share an input, in one memory, with what LoRAs add to them beside.

Of W [out, in], and the downs A [ranks, in] and ups B [out, ranks] of LoRAs,

    [[W, B],
     [A, 0]]

The Linears' own weights become views of where W lies on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.anima_runtime.memory.float8 import Float8Linear
from library.anima_runtime.memory.weight_swap import SwappedBlock
from library.anima_runtime.ops.writing import write_out


class LastingWeights:
    """Weights that lie so on the device. up and down are theirs to write who know the LoRAs."""

    def __init__(self, linears: Sequence[nn.Linear], ranks: int) -> None:
        widths, in_width = [linear.out_features for linear in linears], linears[0].in_features
        self._whole = linears[0].weight.new_zeros(sum(widths) + ranks, in_width + ranks)
        self.up_OR, self.down_RI = self._whole[: sum(widths), in_width:], self._whole[sum(widths) :, :in_width]
        place_OI = self._whole[: sum(widths), :in_width]
        for linear, place in zip(linears, place_OI.split(widths), strict=True):
            place.copy_(linear.weight.detach())
            linear.weight.data = place

    def whole(self) -> Tensor:
        """All of it, not to be changed: [out + ranks, in + ranks]."""
        return self._whole


class WrittenWeights:
    """Weights that are written out for each use, as they have 8 bits or are there for their block's turn only."""

    def __init__(self, linears: Sequence[nn.Linear], ranks: int, swapped: SwappedBlock | None) -> None:
        weight_OI = torch.cat([linear.weight.detach() for linear in linears])
        self._weight_OI = weight_OI if swapped is None else swapped.add(weight_OI)
        device, dtype = self._weight_OI.device, weight_OI.dtype
        for linear, place in zip(linears, self._weight_OI.split([len(each.weight) for each in linears]), strict=True):
            linear.weight.data = place
            linear.to(device)  # bias and scales
        self._scale_O1 = None
        if isinstance(linears[0], Float8Linear):
            self._scale_O1, dtype = torch.cat([linear.scale_O1 for linear in linears]), linears[0].product_dtype
        self.up_OR = torch.zeros(len(weight_OI), ranks, dtype=dtype, device=device)
        self.down_RI = self.up_OR.new_zeros(ranks, weight_OI.shape[1])

    def whole(self) -> Tensor:
        """As `LastingWeights.whole`."""
        return write_out(self._weight_OI, self._scale_O1, self.up_OR, self.down_RI)


def joined_weights(
    linears: Sequence[nn.Linear], ranks: int, swapped: SwappedBlock | None
) -> LastingWeights | WrittenWeights:
    """As the Linears' weights are. ranks: of all LoRAs together, padding and all. swapped: their block, if it is."""
    if swapped is None and not isinstance(linears[0], Float8Linear):
        return LastingWeights(linears, ranks)
    return WrittenWeights(linears, ranks, swapped)
