"""The transformer's blocks with their adapters, written out forward and backward: few passes over memory, no compiler.

Computes what `AnimaTransformer`'s blocks and the hooks of LoRA, LoKr and NormDelta compute, from the same weights; see
`block` for one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.anima_runtime.attention import RotaryTables
from library.anima_runtime.memory.parking import Parking
from library.anima_runtime.memory.weight_swap import SwappedBlock, WeightSwap
from library.anima_runtime.transformer import AnimaTransformer, Block
from networks.adapter import NO_DROPOUT
from networks.fused.backward import block_backward
from networks.fused.block import FusedBlock
from networks.fused.checkpoint import KeepingTape, ParkingTape, RecomputingTape, SelectiveTape
from networks.fused.context import ContextProducts
from networks.fused.llm_adapter import FusedLLMAdapter
from networks.fused.parts import TrainedWeights
from networks.fused.tape import Given, Tape
from networks.lokr import LoKr
from networks.lora import LoRA
from networks.module_names import LLM_ADAPTER
from networks.network import AdapterNetwork
from networks.norm import NormDelta


class _RunBlock(torch.autograd.Function):
    """A block as one step of autograd. Its parameters are inputs so that they get gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_BLD: Tensor, first: Tensor, second: Tensor, third: Tensor, k_NE: Tensor, v_NE: Tensor, given: Given,
        fused: FusedBlock, tape: Tape, *_: nn.Parameter,
    ) -> Tensor:  # fmt: skip
        """The modulations, k and v are given's, once more so that they get gradients."""
        ctx.fused, ctx.given, ctx.tape = fused, given, tape
        return fused.forward(x_BLD, given, tape)

    @staticmethod
    def backward(ctx: Any, dx_BLD: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, *wants_each = ctx.needs_input_grad[:4]
        dx, dmodulations, found = block_backward(
            ctx.fused, dx_BLD.contiguous(), ctx.tape, ctx.given, wants_x, any(wants_each)
        )
        dcontext = ctx.given.context.gradients()
        ctx.tape = ctx.given = None  # this step of autograd may be there until the last one is done
        return dx, *dmodulations, *dcontext, None, None, None, *found


class FusedBlocks:
    """All blocks of a transformer with a network's adapters; see `fuse_blocks`."""

    def __init__(
        self,
        transformer: AnimaTransformer,
        network: AdapterNetwork,
        parking: Parking | None,
        swap: WeightSwap | None,
        selective: bool,
    ) -> None:
        self._parking, self._swap, self._selective = parking, swap, selective
        first_swapped = len(transformer.blocks) - (0 if swap is None else len(swap.homes))
        self._network, adapters = network, network.adapters
        self._plainly = transformer.run_blocks
        self._context = ContextProducts(transformer, adapters)
        self._blocks = []
        for number, block in enumerate(transformer.blocks):
            prefix = f"blocks.{number}."
            own = {path.removeprefix(prefix): adapter for path, adapter in adapters.items() if path.startswith(prefix)}
            swapped = None if number < first_swapped else SwappedBlock(swap, number - first_swapped)
            self._blocks.append(FusedBlock(block, own, swapped))
        joints = [*self._context.joints, *(joint for fused in self._blocks for joint in fused.joints)]
        norms = [norm for fused in self._blocks for norm in fused.norms]
        self._weights = TrainedWeights(list(adapters.values()), joints, norms)
        self._joins_modulations = not any(".adaln_modulation_" in path for path in adapters)
        if self._joins_modulations:
            self._down, self._up = _join_modulations(transformer.blocks)

    def __call__(
        self,
        x_BLD: Tensor,
        time_BD: Tensor,
        shared_modulation_BK: Tensor,
        context_BSD: Tensor,
        rotary: RotaryTables,
        zero_rows: int = 0,
    ) -> Tensor:
        """See `Block.forward`. zero_rows: how many rows of the context are zero and not there."""
        if self._swap is not None:
            self._swap.begin()
        if self._network.multiplier != 1:
            return self._plainly(x_BLD, time_BD, shared_modulation_BK, context_BSD, rotary, zero_rows)
        self._weights.take()
        modulations = self._modulations(time_BD, shared_modulation_BK)
        for number, (fused, context) in enumerate(zip(self._blocks, self._context(context_BSD), strict=True)):
            given = Given(modulations[3 * number : 3 * number + 3], context, rotary, zero_rows)
            inputs, parameters = (x_BLD, *given.modulations, context.k_NE, context.v_NE), fused.parameters()
            if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *parameters)):
                tape = self._tape(fused, given, is_last=number == len(self._blocks) - 1)
                x_BLD = _RunBlock.apply(*inputs, given, fused, tape, *parameters)
            else:
                x_BLD = fused.forward(x_BLD, given, tape=None)
        return x_BLD

    def _tape(self, fused: FusedBlock, given: Given, is_last: bool) -> Tape:
        if not fused.block.recomputes:
            return SelectiveTape(fused, given) if self._selective else KeepingTape()
        if self._parking is None:
            return RecomputingTape(fused, given)
        return ParkingTape(fused, given, self._parking, stays=is_last)

    def _modulations(self, time_BD: Tensor, shared_BK: Tensor) -> Sequence[Tensor]:
        """Those of all branches, block after block."""
        if not self._joins_modulations:
            modules = [module for fused in self._blocks for module in _modulation_modules(fused.block)]
            return [module(time_BD) + shared_BK for module in modules]
        ranks_MBR = F.linear(F.silu(time_BD), self._down).unflatten(1, (len(self._up), -1)).transpose(0, 1)
        return (torch.bmm(ranks_MBR, self._up.transpose(1, 2)) + shared_BK).unbind()


def fuse_blocks(
    transformer: AnimaTransformer,
    network: AdapterNetwork,
    parking: Parking | None = None,
    swap: WeightSwap | None = None,
    selective: bool = False,
) -> None:
    """Has the transformer's blocks computed by `FusedBlocks`; `fuse_obstacle` must have found nothing.

    The LLM adapter as well, by `FusedLLMAdapter`, if gradients go through it; else it is to give the bits that caches
    of its rows hold. parking: for what gradient checkpointing keeps of the blocks; see `checkpoint`. swap: for
    the products' weights of the last blocks, as many as it is for, which must lie in main memory. selective: whether
    blocks without gradient checkpointing are to keep less; see `SelectiveTape`.
    """
    transformer.run_blocks = FusedBlocks(transformer, network, parking, swap, selective)
    if _passes_llm_adapter(network):
        transformer.llm_adapter.run_rows = FusedLLMAdapter(transformer.llm_adapter, network)


def fuse_obstacle(transformer: AnimaTransformer, network: nn.Module) -> str | None:
    """Why the blocks cannot be computed so; None where they can."""
    if not isinstance(network, AdapterNetwork):
        return "the network is another package's"
    config = transformer.config
    fits = _fits(config.width, config.mlp_width, config.head_size)
    parts = ["blocks."]
    if _passes_llm_adapter(network):
        adapter = config.llm_adapter
        fits = fits and _fits(adapter.width, adapter.mlp_width, adapter.head_size) and _fits(adapter.context_width)
        parts.append(LLM_ADAPTER)
    if not fits:
        return "the model's widths do not fit the kernels"
    return next(filter(None, (_obstacle_of(network, part) for part in parts)), None)


def _passes_llm_adapter(network: AdapterNetwork) -> bool:
    """Whether gradients may go through the LLM adapter."""
    return network.adapts("llm_adapter") or network.adapts("text_encoder")


def _fits(width: int, mlp_width: int = 128, head_size: int = 32) -> bool:
    """Kernels take whole rows, whose length must be a power of 2."""
    is_whole = width.bit_count() == 1 and width >= 256
    return is_whole and mlp_width % 128 == 0 and head_size in (32, 64, 128, 256)


def _obstacle_of(network: AdapterNetwork, prefix: str) -> str | None:
    """What adapters under these paths have that is not among what is computed."""
    kinds = set()
    for path, adapter in network.adapters.items():
        if path.startswith(prefix) and ".adaln_modulation_" not in path:
            if not isinstance(adapter, LoRA | LoKr | NormDelta):
                return f"{path} has a {type(adapter).__name__}"
            if adapter.dropouts != NO_DROPOUT or adapter.dora_scale is not None:
                return f"dropout and DoRA are not among what it computes, as {path} has"
            kinds.add(type(adapter))
    return f"{prefix}* have both LoRA and LoKr" if {LoRA, LoKr} <= kinds else None


def _join_modulations(blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """The weights of all modulations in two tensors, [M * rank, D] and [M, 3 D, rank], of which they become views."""
    pairs = [(module[1], module[2]) for block in blocks for module in _modulation_modules(block)]
    downs, ups = (list(linears) for linears in zip(*pairs, strict=True))
    down = torch.cat([linear.weight.detach() for linear in downs])
    up = torch.stack([linear.weight.detach() for linear in ups])
    for linear, place in zip(downs, down.chunk(len(downs)), strict=True):
        linear.weight.data = place
    for linear, place in zip(ups, up, strict=True):
        linear.weight.data = place
    return down, up


def _modulation_modules(block: Block) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    return block.adaln_modulation_self_attn, block.adaln_modulation_cross_attn, block.adaln_modulation_mlp
