"""The frozen weights of Linears that share an input, in one memory, with what LoRAs add to them beside.

Of W [out, in], and the downs A [ranks, in] and ups B [out, ranks] of LoRAs,

    [[W, B],
     [A, 0]]

The Linears' own weights become views of that memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.anima_runtime.float8 import Float8Linear, write_out


class LastingWeights:
    """Weights in the dtype of products. up and down are theirs to write who know the LoRAs."""

    def __init__(self, linears: Sequence[nn.Linear], ranks: int) -> None:
        widths, in_width = [linear.out_features for linear in linears], linears[0].in_features
        self._whole = linears[0].weight.new_zeros(sum(widths) + ranks, in_width + ranks)
        self.up_OR, self.down_RI = self._whole[: sum(widths), in_width:], self._whole[sum(widths) :, :in_width]
        _move([linear.weight for linear in linears], self._whole[: sum(widths), :in_width])

    def whole(self) -> Tensor:
        """All of it, not to be changed: [out + ranks, in + ranks]."""
        return self._whole


class Float8Weights:
    """Weights of 8 bits, which are written out for each use."""

    def __init__(self, linears: Sequence[Float8Linear], ranks: int) -> None:
        out_width, in_width, like = sum(linear.out_features for linear in linears), linears[0].in_features, linears[0]
        self._weight_OI = like.weight.new_empty(out_width, in_width)
        self._scale_O1 = torch.cat([linear.scale_O1 for linear in linears])
        self.up_OR = like.weight.new_zeros(out_width, ranks, dtype=like.product_dtype)
        self.down_RI = self.up_OR.new_zeros(ranks, in_width)
        _move([linear.weight for linear in linears], self._weight_OI)

    def whole(self) -> Tensor:
        """As `LastingWeights.whole`."""
        return write_out(self._weight_OI, self._scale_O1, self.up_OR, self.down_RI)


def joined_weights(linears: Sequence[nn.Linear], ranks: int = 0) -> LastingWeights | Float8Weights:
    """As the Linears' weights are. ranks: of all LoRAs together, padding and all."""
    return (Float8Weights if isinstance(linears[0], Float8Linear) else LastingWeights)(linears, ranks)


def _move(weights: Sequence[nn.Parameter], place_OI: Tensor) -> None:
    for weight, place in zip(weights, place_OI.split([len(weight) for weight in weights]), strict=True):
        place.copy_(weight.detach())
        weight.data = place
