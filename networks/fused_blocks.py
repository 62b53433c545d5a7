"""The transformer's blocks with their adapters, written out forward and backward: few passes over memory, no compiler.

Computes what `AnimaTransformer`'s blocks and the hooks of LoRA, LoKr and NormDelta compute, from the same weights; see
`fused_block` for one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.anima_runtime.attention import RotaryTables
from library.anima_runtime.block_ops import ManyCopies
from library.anima_runtime.transformer import AnimaTransformer, Block
from networks.adapter import NO_DROPOUT
from networks.aside import Aside
from networks.fused_block import FusedBlock
from networks.lokr import LoKr
from networks.lora import LoRA
from networks.network import AdapterNetwork
from networks.norm import NormDelta


class _RunBlock(torch.autograd.Function):
    """A block as one step of autograd. Its parameters are inputs so that they get gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_BLD: Tensor, context_BSD: Tensor, first: Tensor, second: Tensor, third: Tensor,
        rotary: RotaryTables, zero_rows: int, fused: FusedBlock, *_: nn.Parameter,
    ) -> Tensor:  # fmt: skip
        inputs = x_BLD, (first, second, third), context_BSD, rotary, zero_rows
        out, activations = fused.forward(*inputs)
        ctx.fused, ctx.inputs = fused, inputs
        ctx.activations = None if fused.block.recomputes else activations
        return out

    @staticmethod
    def backward(ctx: Any, dx_BLD: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, wants_context, *wants_each = ctx.needs_input_grad[:5]
        saved, rotary = ctx.activations, ctx.inputs[3]
        if saved is None:
            _, saved = ctx.fused.forward(*ctx.inputs)
        ctx.activations = None
        dx, dmodulations, dcontext, found = ctx.fused.backward(
            dx_BLD.contiguous(), saved, ctx.inputs[1], rotary, wants_x, any(wants_each), wants_context
        )
        return dx, dcontext, *dmodulations, None, None, None, *found


class FusedBlocks:
    """All blocks of a transformer with a network's adapters; see `fuse_blocks`."""

    def __init__(self, transformer: AnimaTransformer, network: AdapterNetwork) -> None:
        self._network, adapters = network, network.adapters
        self._plainly = transformer.run_blocks
        self._blocks, aside = [], Aside(transformer.t_embedding_norm.weight.device)
        for number, block in enumerate(transformer.blocks):
            prefix = f"blocks.{number}."
            own = {path.removeprefix(prefix): adapter for path, adapter in adapters.items() if path.startswith(prefix)}
            self._blocks.append(FusedBlock(block, own, aside))
        self._alphas: list[float] = []
        self._copies = ManyCopies(())
        self._norms = [norm for fused in self._blocks for norm in fused.norms if norm.adapter is not None]
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
        if self._network.multiplier != 1:
            return self._plainly(x_BLD, time_BD, shared_modulation_BK, context_BSD, rotary, zero_rows)
        self._take_linears()
        self._take_norms()
        modulations = self._modulations(time_BD, shared_modulation_BK)
        for number, fused in enumerate(self._blocks):
            own = modulations[3 * number : 3 * number + 3]
            x_BLD = _RunBlock.apply(x_BLD, context_BSD, *own, rotary, zero_rows, fused, *fused.parameters())
        return x_BLD

    def _take_linears(self) -> None:
        """Brings what the adapters now hold to where products read it, times what their alphas say."""
        alphas = [adapter.alpha for adapter in self._network.adapters.values()]
        if alphas != self._alphas:  # at first, and when a state or a file that was loaded brought its own
            self._alphas = alphas
            joints = [joint for fused in self._blocks for joint in fused.joints]
            self._copies = ManyCopies([copy for joint in joints for copy in joint.copies()])
        self._copies.run()

    @torch.no_grad()
    def _take_norms(self) -> None:
        """Adds what the adapters now hold to the norms' weights."""
        if self._norms:
            pairs = [(norm.base, norm.adapter.w_norm) for norm in self._norms]
            for norm, weight in zip(self._norms, torch._foreach_add(*map(list, zip(*pairs, strict=True))), strict=True):
                norm.weight = weight

    def _modulations(self, time_BD: Tensor, shared_BK: Tensor) -> Sequence[Tensor]:
        """Those of all branches, block after block."""
        if not self._joins_modulations:
            modules = [module for fused in self._blocks for module in _modulation_modules(fused.block)]
            return [module(time_BD) + shared_BK for module in modules]
        ranks_MBR = F.linear(F.silu(time_BD), self._down).unflatten(1, (len(self._up), -1)).transpose(0, 1)
        return (torch.bmm(ranks_MBR, self._up.transpose(1, 2)) + shared_BK).unbind()


def fuse_blocks(transformer: AnimaTransformer, network: AdapterNetwork) -> None:
    """Has the transformer's blocks computed by `FusedBlocks`; `fuse_obstacle` must have found nothing."""
    transformer.run_blocks = FusedBlocks(transformer, network)


def fuse_obstacle(transformer: AnimaTransformer, network: nn.Module) -> str | None:
    """Why the blocks cannot be computed so; None where they can."""
    if not isinstance(network, AdapterNetwork):
        return "the network is another package's"
    config = transformer.config
    # Kernels take whole rows, whose length must be a power of 2, and four heads at a time.
    fits = config.width.bit_count() == 1 and config.width >= max(256, 4 * config.head_size)
    if not fits or config.mlp_width % 128 or config.head_size not in (32, 64, 128, 256):
        return "the model's widths do not fit the kernels"
    kinds = set()
    for path, adapter in network.adapters.items():
        if path.startswith("blocks.") and ".adaln_modulation_" not in path:
            if not isinstance(adapter, LoRA | LoKr | NormDelta):
                return f"{path} has a {type(adapter).__name__}"
            if adapter.dropouts != NO_DROPOUT or adapter.dora_scale is not None:
                return "dropout and DoRA are not among what it computes"
            kinds.add(type(adapter))
    if {LoRA, LoKr} <= kinds:
        return "it has both LoRA and LoKr"
    return None


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
