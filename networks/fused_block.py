"""One block of the transformer with its adapters, written out forward and backward.

Products go through `joint_linear`, what lies between them through `block_ops`, attention through the model's own
function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from library.anima_runtime.attention import RotaryTables
from library.anima_runtime.attention_passes import Attended, Gradients, attend_backward, attend_forward
from library.anima_runtime.block_ops import (
    Gated,
    Modulation,
    ModulationSums,
    Normed,
    Sum,
    empty_head_sums,
    empty_sums,
    gated_norm,
    gated_norm_backward,
    gelu,
    gelu_backward,
    head_norms,
    head_norms_backward,
    summed,
)
from library.anima_runtime.transformer import Block
from networks.adapter import Adapter
from networks.aside import Aside
from networks.fused_parts import FusedNorm, Joint, Parts, heads, norm_gradients, rows


class Activations(NamedTuple):
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
    """One block. adapters: by the path of the module in the block, those it has. aside: computes their gradients.

    Each branch is x + gate * f(LayerNorm(x) * (1 + scale) + shift); `gated_norm` takes the end of one together with the
    beginning of the next.
    """

    def __init__(self, block: Block, adapters: Mapping[str, Adapter], aside: Aside) -> None:
        parts = Parts(block, adapters, aside)
        self.block, self.aside = block, aside
        self.head_size = block.self_attn.head_size
        self.qkv = parts.joint("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.self_output = parts.joint("self_attn.output_proj")
        self.q = parts.joint("cross_attn.q_proj")
        self.kv = parts.joint("cross_attn.k_proj", "cross_attn.v_proj")
        self.cross_output = parts.joint("cross_attn.output_proj")
        self.wide = parts.joint("mlp.layer1")
        self.narrow = parts.joint("mlp.layer2")
        self.norms = [parts.norm(f"{name}.{part}_norm") for name in ("self_attn", "cross_attn") for part in ("q", "k")]
        self.joints = (self.qkv, self.self_output, self.q, self.kv, self.cross_output, self.wide, self.narrow)

    def parameters(self) -> list[nn.Parameter]:
        """All adapters', in the order of `backward`'s gradients."""
        return [parameter for part in (*self.joints, *self.norms) for parameter in part.parameters()]

    def forward(
        self, x_BLD: Tensor, modulations: Sequence[Tensor], context_BSD: Tensor, rotary: RotaryTables, zero_rows: int
    ) -> tuple[Tensor, Activations]:
        """As `Block.forward`: x (B, L, D), and what `backward` needs.

        modulations: shift, scale and gate (B, 3 D) of each branch, those that all branches share added. zero_rows: how
        many further rows of the context are zero.
        """
        self_attn, cross_attn = self.block.self_attn, self.block.cross_attn
        count = x_BLD.shape[0] * x_BLD.shape[1]
        (shift_scale_1, gate_1), (shift_scale_2, gate_2), (shift_scale_3, gate_3) = map(_parts, modulations)
        x_first = x_BLD
        _, first = gated_norm(x_first, None, shift_scale_1, self.qkv.empty_input(count))
        qkv = self.qkv.forward(first.normed_ND)
        q, k = self._normed(qkv[:2], self.norms[:2], rotary, x_BLD)
        self_attended = attend_forward(self_attn.attend, q, k, self.heads(qkv[2], x_BLD))
        self_output = self.self_output.forward_late(rows(self_attended.output))

        into = self.q.empty_input(count)
        x_second, second = gated_norm(x_first, Gated(self_output[0], gate_1), shift_scale_2, into)
        q_cross = self.q.forward(second.normed_ND)
        context_rows = rows(context_BSD)
        kv, kv_hidden = self.kv.forward_any(context_rows)
        (q,) = self._normed(q_cross, self.norms[2:3], None, x_BLD)
        (k,) = self._normed(kv[:1], self.norms[3:], None, x_BLD)
        cross_attended = attend_forward(cross_attn.attend, q, k, self.heads(kv[1], x_BLD), zero_rows)
        cross_output = self.cross_output.forward_late(rows(cross_attended.output))

        into = self.wide.empty_input(count)
        x_third, third = gated_norm(x_second, Gated(cross_output[0], gate_2), shift_scale_3, into)
        wide = self.wide.forward(third.normed_ND)
        activated = torch.empty_like(wide[0])
        gelu(wide[0], activated)
        narrow = self.narrow.forward_late(activated)
        x_out, _ = gated_norm(x_third, Gated(narrow[0], gate_3), None)
        return x_out, Activations(
            x_first, first, qkv, self_attended, self_output, x_second, second, q_cross, context_rows, kv, kv_hidden,
            cross_attended, cross_output, x_third, third, wide, activated, narrow,
        )  # fmt: skip

    def backward(
        self,
        dx_BLD: Tensor,
        saved: Activations,
        modulations: Sequence[Tensor],
        rotary: RotaryTables,
        wants_x: bool,
        wants_modulations: bool,
        wants_context: bool,
    ) -> tuple[Tensor | None, Sequence[Tensor | None], Tensor | None, list[Tensor]]:
        """Gradients of x, the modulations, the context, and the parameters; None for those not wanted."""
        done = _BackwardPass(self, saved, modulations, rotary, dx_BLD, wants_modulations)
        done.pass_mlp()
        dcontext_BSD = done.pass_cross_attention(wants_context)
        done.pass_self_attention(wants_x or wants_modulations)
        dmodulations: Sequence[Tensor | None] = [None] * 3
        if done.partial_BPSD is not None:
            dmodulations = summed(done.partial_BPSD).to(modulations[0].dtype).chunk(3, dim=1)
        self.aside.join()
        done.add_norms()
        gradients = [gradient for part in (*self.joints, *self.norms) for gradient in done.found[part]]
        return done.dx_BLD if wants_x else None, dmodulations, dcontext_BSD, gradients

    def heads(self, x_NE: Tensor, x_BLD: Tensor) -> Tensor:
        """Rows [N, E] of as many samples as x has, as (B, L, heads, D)."""
        return heads(x_NE, len(x_BLD), self.head_size)

    def _normed(
        self, inputs: Sequence[Tensor], norms: Sequence[FusedNorm], rotary: RotaryTables | None, x_BLD: Tensor
    ) -> list[Tensor]:
        """(B, L, heads, D) each."""
        length = len(inputs[0]) // len(x_BLD)
        normed = head_norms(inputs, [norm.weight for norm in norms], rotary, length)
        return [self.heads(x_NE, x_BLD) for x_NE in normed]


class _BackwardPass:
    """A block's backward pass, branch by branch from the last: from behind the branch's gate to the norm before it.

    dx_BLD: the gradient of the residual stream as far as the pass has come, without what comes through the norm reached
    last: dnormed_ND, the gradient of its result, which the next branch takes along. found: gradients of the parameters
    of each part. partial_BPSD, norm_sums_MPD: sums for gradients of modulations and of norms, where they are wanted.
    """

    def __init__(
        self,
        fused: FusedBlock,
        saved: Activations,
        modulations: Sequence[Tensor],
        rotary: RotaryTables,
        dx_BLD: Tensor,
        wants_modulations: bool,
    ) -> None:
        self.fused, self.saved, self.rotary = fused, saved, rotary
        self.shift_scales, self.gates = zip(*map(_parts, modulations), strict=True)
        self.count = dx_BLD.shape[0] * dx_BLD.shape[1]
        self.dx_BLD = dx_BLD
        self.dnormed_ND: Tensor | None = None
        self.found: dict[Joint | FusedNorm, list[Tensor]] = {}
        self.partial_BPSD = empty_sums(dx_BLD, slots=9) if wants_modulations else None
        trains = any(norm.adapter is not None for norm in fused.norms)
        self.norm_sums_MPD = empty_head_sums(rows(dx_BLD), len(fused.norms), fused.head_size) if trains else None

    def pass_mlp(self) -> None:
        """The last branch, which comes first."""
        fused, saved = self.fused, self.saved
        gradients = fused.narrow.empty_gradients(self.count)
        gate = Gated(saved.narrow[0], self.gates[2])
        gated_norm_backward(self.dx_BLD, None, saved.x_third, None, None, gate, gradients[0], self._sums(2, 2))
        dactivated, self.found[fused.narrow] = fused.narrow.backward(gradients, saved.activated, saved.narrow[1], True)
        gradients = fused.wide.empty_gradients(self.count)
        gelu_backward(dactivated, saved.wide[0], gradients[0])
        self.dnormed_ND, self.found[fused.wide] = fused.wide.backward(gradients, saved.third.normed_ND, None, True)

    def pass_cross_attention(self, wants_context: bool) -> Tensor | None:
        """Returns the gradient of the context (B, S, context width), if wanted."""
        fused, saved = self.fused, self.saved
        gradients = fused.cross_output.empty_gradients(self.count)
        gate = Gated(saved.cross_output[0], self.gates[1])
        self.dx_BLD = gated_norm_backward(
            self.dx_BLD, self.dnormed_ND, saved.x_third, saved.third, self.shift_scales[2], gate, gradients[0],
            self._sums(2, 1),
        )  # fmt: skip
        self.dnormed_ND = None
        dq, dk, dv = self._pass_attention(fused.cross_output, gradients, saved.cross_attended, saved.cross_output[1])
        gradients = fused.q.empty_gradients(self.count)
        self._pass_head_norms(2, (dq,), saved.q, None, gradients)
        self.dnormed_ND, self.found[fused.q] = fused.q.backward(gradients, saved.second.normed_ND, None, True)
        gradients = fused.kv.empty_gradients(len(saved.context_rows))
        self._pass_head_norms(3, (dk, dv), saved.kv[:1], None, gradients)
        dcontext_NC, self.found[fused.kv] = fused.kv.backward(
            gradients, saved.context_rows, saved.kv_hidden, wants_context
        )
        return None if dcontext_NC is None else dcontext_NC.unflatten(0, (len(self.dx_BLD), -1))

    def pass_self_attention(self, wants_begin: bool) -> None:
        """wants_begin: whether the gradients of its norm and of the block's x are wanted."""
        fused, saved = self.fused, self.saved
        gradients = fused.self_output.empty_gradients(self.count)
        gate = Gated(saved.self_output[0], self.gates[0])
        self.dx_BLD = gated_norm_backward(
            self.dx_BLD, self.dnormed_ND, saved.x_second, saved.second, self.shift_scales[1], gate, gradients[0],
            self._sums(1, 0),
        )  # fmt: skip
        self.dnormed_ND = None
        dq, dk, dv = self._pass_attention(fused.self_output, gradients, saved.self_attended, saved.self_output[1])
        gradients = fused.qkv.empty_gradients(self.count)
        self._pass_head_norms(0, (dq, dk, dv), saved.qkv[:2], self.rotary, gradients)
        dnormed_ND, self.found[fused.qkv] = fused.qkv.backward(gradients, saved.first.normed_ND, None, wants_begin)
        if wants_begin:
            self.dx_BLD = gated_norm_backward(
                self.dx_BLD, dnormed_ND, saved.x_first, saved.first, self.shift_scales[0], None, None, self._sums(0, 0)
            )

    def add_norms(self) -> None:
        """Last of all, the gradients of the norms that train."""
        self.found |= norm_gradients(self.fused.norms, self.norm_sums_MPD)

    def _sums(self, norm: int, gate: int) -> ModulationSums | None:
        """For shift and scale of one branch, counted from 0, and the gate of another."""
        return None if self.partial_BPSD is None else ModulationSums(self.partial_BPSD, 3 * norm, 3 * gate + 2)

    def _pass_attention(
        self,
        output: Joint,
        gradients: Sequence[Tensor],
        attended: Attended,
        hidden_NR: Tensor | None,
    ) -> Gradients:
        """Gradients of q, k and v (B, L, heads, D), from those of the output."""
        dattended, self.found[output] = output.backward(gradients, rows(attended.output), hidden_NR, True)
        return attend_backward(attended, dattended)

    def _pass_head_norms(
        self,
        first: int,
        gradients: Sequence[Tensor],
        inputs: Sequence[Tensor],
        rotary: RotaryTables | None,
        into: Sequence[Tensor],
    ) -> None:
        """The norms from number `first`, and v beside them, if given, from the gradients (B, L, heads, D) of each."""
        norms = slice(first, first + len(inputs))
        weights = [norm.weight for norm in self.fused.norms[norms]]
        length = len(inputs[0]) // len(self.dx_BLD)
        sums = None if self.norm_sums_MPD is None else self.norm_sums_MPD[norms]
        head_norms_backward([rows(x).flatten(1) for x in gradients], inputs, weights, rotary, length, into, sums)


def _parts(modulation_BK: Tensor) -> tuple[Modulation, Tensor]:
    shift, scale, gate = modulation_BK.chunk(3, dim=1)
    return Modulation(shift, scale), gate
