"""The transformer's blocks with their adapters, written out forward and backward: few passes over memory, no compiler.

Computes what `AnimaTransformer`'s blocks and the hooks of LoRA and NormDelta compute, from the same weights. Products
go through `joint_linear`, what lies between them through `block_ops`, attention through the model's own function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.anima_runtime.attention import RMSNorm, RotaryTables
from library.anima_runtime.attention_backends import AttentionFunction
from library.anima_runtime.block_ops import (
    Gated,
    ManyCopies,
    Modulation,
    ModulationSums,
    Normed,
    Sum,
    empty_sums,
    gated_norm,
    gated_norm_backward,
    gelu,
    gelu_backward,
    head_norm,
    head_norm_backward,
    summed,
)
from library.anima_runtime.transformer import AnimaTransformer, Block
from networks.adapter import NO_DROPOUT, Adapter
from networks.joint_linear import JointLinear
from networks.joint_lokr import JointLoKr
from networks.lokr import LoKr
from networks.lora import LoRA
from networks.network import AdapterNetwork
from networks.norm import NormDelta

# Kernels share the backward pass out by keys and heads, and few keys leave half an H200 idle: queries in two parts, as
# samples of their own, take 121 µs instead of 182 for 4096 queries of 512 keys.
_FEW_KEYS = 4


class FusedNorm:
    """A q or k norm with what an adapter adds to its weight.

    weight [D]: as it was when `FusedBlocks` last ran, in float32 at least.
    """

    def __init__(self, norm: RMSNorm, adapter: NormDelta | None) -> None:
        self.base = norm.weight.detach().to(torch.promote_types(norm.weight.dtype, torch.float32))
        self.weight = self.base
        self.adapter = adapter

    def parameters(self) -> list[nn.Parameter]:
        return [] if self.adapter is None else [self.adapter.w_norm]


class Attended(NamedTuple):
    """What attention's backward pass needs: its inputs as leaves, (B, L, heads, D), and its result, (B, L, E).

    parts: how many samples were made of each.
    """

    inputs: tuple[Tensor, ...]
    output: Tensor
    parts: int


class _Activations(NamedTuple):
    """What a block's forward pass leaves for the backward pass."""

    x_first: Tensor
    first: Normed
    qkv: list[Tensor]
    self_attended: Attended
    self_output: tuple[Sum, Tensor | None]
    x_second: Tensor
    second: Normed
    q: list[Tensor]
    context_rows: Tensor
    kv: list[Tensor]
    kv_hidden: Tensor | None
    cross_attended: Attended
    cross_output: tuple[Sum, Tensor | None]
    x_third: Tensor
    third: Normed
    wide: list[Tensor]
    activated: Tensor
    narrow: tuple[Sum, Tensor | None]


class FusedBlock:
    """One block. adapters: by the path of the module in the block, those it has."""

    def __init__(self, block: Block, adapters: Mapping[str, Adapter]) -> None:
        def joint(*paths: str) -> JointLinear | JointLoKr:
            own = [adapters.get(path) for path in paths]
            kind = JointLoKr if any(isinstance(adapter, LoKr) for adapter in own) else JointLinear
            return kind([block.get_submodule(path) for path in paths], own)

        def norm(path: str) -> FusedNorm:
            return FusedNorm(block.get_submodule(path), adapters.get(path))

        self.block = block
        self.head_size = block.self_attn.head_size
        self.qkv = joint("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.self_output = joint("self_attn.output_proj")
        self.q = joint("cross_attn.q_proj")
        self.kv = joint("cross_attn.k_proj", "cross_attn.v_proj")
        self.cross_output = joint("cross_attn.output_proj")
        self.wide = joint("mlp.layer1")
        self.narrow = joint("mlp.layer2")
        self.norms = [norm(f"{name}.{part}_norm") for name in ("self_attn", "cross_attn") for part in ("q", "k")]
        self.joints = (self.qkv, self.self_output, self.q, self.kv, self.cross_output, self.wide, self.narrow)

    def parameters(self) -> list[nn.Parameter]:
        """All adapters', in the order of `backward`'s gradients."""
        return [parameter for part in (*self.joints, *self.norms) for parameter in part.parameters()]

    def forward(
        self, x_BLD: Tensor, modulations: Sequence[Tensor], context_BSD: Tensor, rotary: RotaryTables
    ) -> tuple[Tensor, _Activations]:
        """modulations: shift, scale and gate (B, 3 D) of each branch."""
        self_attn, cross_attn = self.block.self_attn, self.block.cross_attn
        count = x_BLD.shape[0] * x_BLD.shape[1]
        (shift_scale_1, gate_1), (shift_scale_2, gate_2), (shift_scale_3, gate_3) = map(_parts, modulations)
        x_first = x_BLD
        _, first = gated_norm(x_first, None, shift_scale_1, self.qkv.empty_input(count))
        qkv = self.qkv.forward(first.normed_ND)
        q, k = (self._normed(x, norm, rotary, x_BLD) for x, norm in zip(qkv[:2], self.norms[:2], strict=True))
        self_attended = _attend(self_attn.attend, q, k, self._heads(qkv[2], x_BLD))
        self_output = self.self_output.forward_late(_rows(self_attended.output.detach()))

        into = self.q.empty_input(count)
        x_second, second = gated_norm(x_first, Gated(self_output[0], gate_1), shift_scale_2, into)
        q_cross = self.q.forward(second.normed_ND)
        context_rows = _rows(context_BSD)
        kv, kv_hidden = self.kv.forward_any(context_rows)
        q, k = self._normed(q_cross[0], self.norms[2], None, x_BLD), self._normed(kv[0], self.norms[3], None, x_BLD)
        cross_attended = _attend(cross_attn.attend, q, k, self._heads(kv[1], x_BLD))
        cross_output = self.cross_output.forward_late(_rows(cross_attended.output.detach()))

        into = self.wide.empty_input(count)
        x_third, third = gated_norm(x_second, Gated(cross_output[0], gate_2), shift_scale_3, into)
        wide = self.wide.forward(third.normed_ND)
        activated = torch.empty_like(wide[0])
        gelu(wide[0], activated)
        narrow = self.narrow.forward_late(activated)
        x_out, _ = gated_norm(x_third, Gated(narrow[0], gate_3), None)
        return x_out, _Activations(
            x_first, first, qkv, self_attended, self_output, x_second, second, q_cross, context_rows, kv, kv_hidden,
            cross_attended, cross_output, x_third, third, wide, activated, narrow,
        )  # fmt: skip

    def backward(
        self,
        dx_BLD: Tensor,
        saved: _Activations,
        modulations: Sequence[Tensor],
        rotary: RotaryTables,
        wants_x: bool,
        wants_modulations: bool,
        wants_context: bool,
    ) -> tuple[Tensor | None, Sequence[Tensor | None], Tensor | None, list[Tensor]]:
        """Gradients of x, the modulations, the context, and the parameters; None for those not wanted."""
        (shift_scale_1, gate_1), (shift_scale_2, gate_2), (shift_scale_3, gate_3) = map(_parts, modulations)
        found: dict[int, list[Tensor]] = {}
        count = dx_BLD.shape[0] * dx_BLD.shape[1]
        partial = empty_sums(dx_BLD, slots=9) if wants_modulations else None

        def sums(norm: int, gate: int) -> ModulationSums | None:
            """For shift and scale of one branch, counted from 0, and the gate of another."""
            return None if partial is None else ModulationSums(partial, 3 * norm, 3 * gate + 2)

        gradients = self.narrow.empty_gradients(count)
        gated_norm_backward(
            dx_BLD, None, saved.x_third, None, None, Gated(saved.narrow[0], gate_3), gradients[0], sums(2, 2)
        )
        dactivated, found[6] = self.narrow.backward(gradients, saved.activated, saved.narrow[1], True)
        gradients = self.wide.empty_gradients(count)
        gelu_backward(dactivated, saved.wide[0], gradients[0])
        dnormed, found[5] = self.wide.backward(gradients, saved.third.normed_ND, None, True)
        gradients, gated = self.cross_output.empty_gradients(count), Gated(saved.cross_output[0], gate_2)
        dx_BLD = gated_norm_backward(
            dx_BLD, dnormed, saved.x_third, saved.third, shift_scale_3, gated, gradients[0], sums(2, 1)
        )
        del dactivated, dnormed

        attended = saved.cross_attended
        rows = _rows(attended.output.detach())
        dattended, found[4] = self.cross_output.backward(gradients, rows, saved.cross_output[1], True)
        dq, dk, dv = _attend_backward(attended, dattended)
        gradients = self.q.empty_gradients(count)
        found[9] = self._normed_backward(dq, saved.q[0], self.norms[2], None, gradients[0], dx_BLD)
        dnormed, found[2] = self.q.backward(gradients, saved.second.normed_ND, None, True)
        gradients = self.kv.empty_gradients(len(saved.context_rows))
        found[10] = self._normed_backward(dk, saved.kv[0], self.norms[3], None, gradients[0], dx_BLD)
        self._heads(gradients[1], dx_BLD).copy_(dv)
        dcontext, found[3] = self.kv.backward(gradients, saved.context_rows, saved.kv_hidden, wants_context)
        gradients, gated = self.self_output.empty_gradients(count), Gated(saved.self_output[0], gate_1)
        dx_BLD = gated_norm_backward(
            dx_BLD, dnormed, saved.x_second, saved.second, shift_scale_2, gated, gradients[0], sums(1, 0)
        )
        del attended, dattended, dq, dk, dv, dnormed

        attended = saved.self_attended
        rows = _rows(attended.output.detach())
        dattended, found[1] = self.self_output.backward(gradients, rows, saved.self_output[1], True)
        dq, dk, dv = _attend_backward(attended, dattended)
        gradients = self.qkv.empty_gradients(count)
        found[7] = self._normed_backward(dq, saved.qkv[0], self.norms[0], rotary, gradients[0], dx_BLD)
        found[8] = self._normed_backward(dk, saved.qkv[1], self.norms[1], rotary, gradients[1], dx_BLD)
        self._heads(gradients[2], dx_BLD).copy_(dv)
        wants_normed = wants_x or wants_modulations
        dnormed, found[0] = self.qkv.backward(gradients, saved.first.normed_ND, None, wants_normed)
        if wants_normed:
            dx_BLD = gated_norm_backward(
                dx_BLD, dnormed, saved.x_first, saved.first, shift_scale_1, None, None, sums(0, 0)
            )
        dmodulations: Sequence[Tensor | None] = [None] * 3
        if partial is not None:
            dmodulations = summed(partial).to(modulations[0].dtype).chunk(3, dim=1)
        dcontext_BSD = None if dcontext is None else dcontext.unflatten(0, (len(dx_BLD), -1))
        return dx_BLD if wants_x else None, dmodulations, dcontext_BSD, [g for part in range(11) for g in found[part]]

    def _heads(self, x_NE: Tensor, x_BLD: Tensor) -> Tensor:
        """Rows of as many samples as x as (B, L, heads, D)."""
        return x_NE.unflatten(0, (len(x_BLD), -1)).unflatten(2, (-1, self.head_size))

    def _normed(self, x_NE: Tensor, norm: FusedNorm, rotary: RotaryTables | None, x_BLD: Tensor) -> Tensor:
        """(B, L, heads, D)"""
        return self._heads(head_norm(x_NE, norm.weight, rotary, len(x_NE) // len(x_BLD)), x_BLD)

    def _normed_backward(
        self, dout: Tensor, x_NE: Tensor, norm: FusedNorm, rotary: RotaryTables | None, dx_NE: Tensor, x_BLD: Tensor
    ) -> list[Tensor]:
        """Writes the gradient of x to dx; returns that of the norm's parameter, if it has one."""
        length = len(x_NE) // len(x_BLD)
        dweight = head_norm_backward(
            _rows(dout).flatten(1), x_NE, norm.weight, rotary, length, dx_NE, norm.adapter is not None
        )
        return [] if norm.adapter is None else [dweight]


class _RunBlock(torch.autograd.Function):
    """A block as one step of autograd. Its parameters are inputs so that they get gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_BLD: Tensor, context_BSD: Tensor, first: Tensor, second: Tensor, third: Tensor,
        rotary: RotaryTables, fused: FusedBlock, *_: nn.Parameter,
    ) -> Tensor:  # fmt: skip
        inputs = x_BLD, (first, second, third), context_BSD, rotary
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
        return dx, dcontext, *dmodulations, None, None, *found


class FusedBlocks:
    """All blocks of a transformer with a network's adapters; see `fuse_blocks`."""

    def __init__(self, transformer: AnimaTransformer, network: AdapterNetwork) -> None:
        self._network, adapters = network, network.adapters
        self._plainly = transformer.run_blocks
        self._blocks = []
        for number, block in enumerate(transformer.blocks):
            prefix = f"blocks.{number}."
            own = {path.removeprefix(prefix): adapter for path, adapter in adapters.items() if path.startswith(prefix)}
            self._blocks.append(FusedBlock(block, own))
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
    ) -> Tensor:
        """See `Block.forward`."""
        if self._network.multiplier != 1:
            return self._plainly(x_BLD, time_BD, shared_modulation_BK, context_BSD, rotary)
        self._take_linears()
        self._take_norms()
        modulations = self._modulations(time_BD, shared_modulation_BK)
        for number, fused in enumerate(self._blocks):
            own = modulations[3 * number : 3 * number + 3]
            x_BLD = _RunBlock.apply(x_BLD, context_BSD, *own, rotary, fused, *fused.parameters())
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


def _parts(modulation_BK: Tensor) -> tuple[Modulation, Tensor]:
    shift, scale, gate = modulation_BK.chunk(3, dim=1)
    return Modulation(shift, scale), gate


def _rows(x_BLD: Tensor) -> Tensor:
    return x_BLD.flatten(0, 1)


def _attend(function: AttentionFunction, q: Tensor, k: Tensor, v: Tensor) -> Attended:
    """Runs the model's attention with a graph of its own, for `_attend_backward`."""
    samples, length = q.shape[:2]
    parts = 2 if k.shape[1] * _FEW_KEYS <= length and length % 2 == 0 else 1
    if parts > 1:
        q = q.reshape(samples * parts, length // parts, *q.shape[2:])
        k, v = (torch.stack([x] * parts, dim=1).flatten(0, 1) for x in (k, v))
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        return Attended(inputs, function(*inputs).reshape(samples, length, -1), parts)


def _attend_backward(attended: Attended, dout_NE: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, (B, L, heads, D) each."""
    dq, dk, dv = torch.autograd.grad(attended.output, attended.inputs, dout_NE.view_as(attended.output))
    if attended.parts > 1:
        dq = dq.unflatten(0, (-1, attended.parts)).flatten(1, 2)
        dk, dv = (x[0 :: attended.parts] + x[1 :: attended.parts] for x in (dk, dv))
    return dq, dk, dv
