"""Keys and values of the text context for the cross-attention of all blocks, made before the first block.

Products of so few rows, 128 of most captions, take little longer than their launches do, of which each block would need
eight, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.anima_runtime.transformer import AnimaTransformer
from networks.adapter import Adapter
from networks.fused.parts import Joint, Parts, rows

# Of the blocks of one product the LoRAs' ups lie in one matrix, with zeros between them: of more blocks the zeros would
# take more memory, and more time, than further launches.
_BLOCKS_OF_A_PRODUCT = 4


class _Room:
    """Where the blocks put the gradients of a product's outputs in a pass."""

    def __init__(self, joint: Joint, count: int) -> None:
        self._joint, self._count = joint, count
        self._gradients: Sequence[Tensor] = ()

    def gradients(self) -> Sequence[Tensor]:
        """Of each output [N, E]; memory is taken when they are first asked for."""
        if not self._gradients:
            self._gradients = self._joint.empty_gradients(self._count)
        return self._gradients


class ContextHeads(NamedTuple):
    """A block's keys, before their norm, and values: rows [N, E] each.

    number: which of the product's outputs the keys are; the values come next.
    """

    k_NE: Tensor
    v_NE: Tensor
    room: _Room
    number: int

    def gradients(self) -> Sequence[Tensor]:
        """Where those of k and v go."""
        return self.room.gradients()[self.number : self.number + 2]


class _RunProduct(torch.autograd.Function):
    """A product as one step of autograd, which follows when the blocks' steps have filled its room."""

    @staticmethod
    def forward(ctx: Any, context_BSC: Tensor, joint: Joint, room: _Room, *_: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.joint, ctx.room, ctx.context_NC, ctx.shape = joint, room, rows(context_BSC), context_BSC.shape
        outputs, ctx.hidden_NR = joint.forward_any(ctx.context_NC)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        wants_context = ctx.needs_input_grad[0]
        dcontext_NC, found = ctx.joint.backward(ctx.room.gradients(), ctx.context_NC, ctx.hidden_NR, wants_context)
        ctx.room = ctx.context_NC = ctx.hidden_NR = None  # this step may be there until the last one is done
        return dcontext_NC.view(ctx.shape) if wants_context else None, None, None, *found


class ContextProducts:
    """joints: the products, of the key and value projections of several blocks each."""

    def __init__(self, transformer: AnimaTransformer, adapters: Mapping[str, Adapter]) -> None:
        parts, device = Parts(transformer, adapters), next(transformer.x_embedder.parameters()).device
        self.joints = []
        for paths in _groups(len(transformer.blocks), adapters):
            for path in paths:
                transformer.get_submodule(path).to(device)  # those of swapped blocks lie in main memory
            self.joints.append(parts.joint(*paths))

    def __call__(self, context_BSC: Tensor) -> list[ContextHeads]:
        """Each block's."""
        found = []
        for joint in self.joints:
            room = _Room(joint, context_BSC.shape[0] * context_BSC.shape[1])
            outputs = _RunProduct.apply(context_BSC, joint, room, *joint.parameters())
            found += [ContextHeads(*outputs[number : number + 2], room, number) for number in range(0, len(outputs), 2)]
        return found


def _groups(depth: int, adapters: Mapping[str, Adapter]) -> Iterator[list[str]]:
    """The projections of each product: of neighbours that all have adapters, or none, lest those be run for nothing."""
    pairs = [[f"blocks.{number}.cross_attn.{name}_proj" for name in "kv"] for number in range(depth)]
    for _, alike in groupby(pairs, key=lambda pair: any(path in adapters for path in pair)):
        own = list(alike)
        for first in range(0, len(own), _BLOCKS_OF_A_PRODUCT):
            yield [path for pair in own[first : first + _BLOCKS_OF_A_PRODUCT] for path in pair]
