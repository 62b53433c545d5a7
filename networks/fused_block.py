"""One block of the transformer with its adapters, written out forward and backward.

Products go through `joint_linear`, what lies between them through `block_ops`, attention through the model's own
function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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
    empty_sums,
    gated_norm,
    gated_norm_backward,
    gelu,
    gelu_backward,
    summed,
)
from library.anima_runtime.transformer import Block
from library.anima_runtime.weight_swap import SwappedBlock
from networks.adapter import Adapter
from networks.fused_parts import FusedNorm, HeadNormsBackward, Joint, Parts, heads, normed_heads, rows


class Given(NamedTuple):
    """What a block takes beside the residual stream.

    modulations: shift, scale and gate (B, 3 D) of each branch, those that all branches share added. zero_rows: how many
    rows of the context are zero and not there.
    """

    modulations: Sequence[Tensor]
    context_BSD: Tensor
    rotary: RotaryTables
    zero_rows: int


class Output(NamedTuple):
    """What a branch's last Linear gives to the gate, None if not known, and what its LoRA made of the input, if any."""

    branch: Sum | None = None
    hidden_NR: Tensor | None = None


class SelfAttention(NamedTuple):
    """What the first branch leaves for the backward pass. x: the residual stream before the branch."""

    x_BLD: Tensor
    normed: Normed
    qkv: list[Tensor]
    attended: Attended
    output: Output = Output()


class CrossAttention(NamedTuple):
    """The same of the second."""

    x_BLD: Tensor
    normed: Normed
    q: list[Tensor]
    context_rows: Tensor
    kv: list[Tensor]
    kv_hidden: Tensor | None
    attended: Attended
    output: Output = Output()


class MLP(NamedTuple):
    """The same of the third."""

    x_BLD: Tensor
    normed: Normed
    wide: list[Tensor]
    activated: Tensor
    output: Output = Output()


Branch = SelfAttention | CrossAttention | MLP


class Tape(Protocol):
    """Has what the branches leave, from the first to the last, and gives it back from the last to the first."""

    def keep(self, branch: Branch) -> None:
        """Takes what a branch leaves, all of it known."""

    def take(self, wants_output: bool) -> Any:
        """What the last branch left that was not yet taken. wants_output: whether `output.branch` must be known."""


class FusedBlock:
    """One block. adapters: by the path of the module in the block, those it has. swapped: itself, if its weights are.

    Each branch is x + gate * f(LayerNorm(x) * (1 + scale) + shift); `gated_norm` takes the end of one together with the
    beginning of the next.
    """

    def __init__(self, block: Block, adapters: Mapping[str, Adapter], swapped: SwappedBlock | None = None) -> None:
        parts = Parts(block, adapters, swapped)
        self.block, self._swapped = block, swapped
        self.head_size = block.self_attn.head_size
        self.qkv = parts.joint("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.self_output = parts.joint("self_attn.output_proj")
        self.q = parts.joint("cross_attn.q_proj")
        self.kv = parts.joint("cross_attn.k_proj", "cross_attn.v_proj")
        self.cross_output = parts.joint("cross_attn.output_proj")
        self.wide = parts.joint("mlp.layer1")
        self.narrow = parts.joint("mlp.layer2")
        if swapped is not None:
            block.to(swapped.swap.device)  # all but what is swapped, which is there by now
            block.register_forward_pre_hook(lambda *_: swapped.enter(backward=False))  # where it is run as it is
        self.norms = [parts.norm(f"{name}.{part}_norm") for name in ("self_attn", "cross_attn") for part in ("q", "k")]
        self.joints = (self.qkv, self.self_output, self.q, self.kv, self.cross_output, self.wide, self.narrow)

    def parameters(self) -> list[nn.Parameter]:
        """All adapters', in the order of `backward`'s gradients."""
        return [parameter for part in (*self.joints, *self.norms) for parameter in part.parameters()]

    def forward(self, x_BLD: Tensor, given: Given, tape: Tape | None) -> Tensor:
        """As `Block.forward`: x (B, L, D). What `backward` needs goes to the tape, if there is one."""
        if self._swapped is not None:
            self._swapped.enter(backward=False)
        former = None
        for number in range(3):
            x_BLD, former = self.run(number, x_BLD, former, given, tape)
        return gated_norm(x_BLD, Gated(former, _parts(given.modulations[2])[1]), None)[0]

    def backward(
        self, dx_BLD: Tensor, tape: Tape, given: Given, wants_x: bool, wants_modulations: bool, wants_context: bool
    ) -> tuple[Tensor | None, Sequence[Tensor | None], Tensor | None, list[Tensor]]:
        """Gradients of x, the modulations, the context, and the parameters; None for those not wanted."""
        if self._swapped is not None:
            self._swapped.enter(backward=True, ends=not wants_x)
        done = _BackwardPass(self, tape, given, dx_BLD, wants_modulations)
        done.pass_mlp()
        dcontext_BSD = done.pass_cross_attention(wants_context)
        done.pass_self_attention(wants_x or wants_modulations)
        dmodulations: Sequence[Tensor | None] = [None] * 3
        if done.partial_BPSD is not None:
            dmodulations = summed(done.partial_BPSD).to(given.modulations[0].dtype).chunk(3, dim=1)
        done.found |= done.head_norms.found()
        gradients = [gradient for part in (*self.joints, *self.norms) for gradient in done.found[part]]
        return done.dx_BLD if wants_x else None, dmodulations, dcontext_BSD, gradients

    def run(
        self, number: int, x_BLD: Tensor, former: Sum | None, given: Given, tape: Tape | None
    ) -> tuple[Tensor, Sum]:
        """Runs a branch, counted from 0: the residual stream before it, and what it gives to its gate.

        former: what the branch before it gave to its own gate; None if x has that already.
        """
        x_BLD, normed = self.begin(number, x_BLD, former, given)
        branch = self.run_inside(number, x_BLD, normed, given)
        output = self.output_of(branch)
        if tape is not None:
            tape.keep(branch._replace(output=output))
        return x_BLD, output.branch

    def begin(self, number: int, x_BLD: Tensor, former: Sum | None, given: Given) -> tuple[Tensor, Normed]:
        """The residual stream before a branch, and its norm."""
        gated = None if former is None else Gated(former, _parts(given.modulations[number - 1])[1])
        into = (self.qkv, self.q, self.wide)[number].empty_input(x_BLD.shape[0] * x_BLD.shape[1])
        return gated_norm(x_BLD, gated, _parts(given.modulations[number])[0], into)

    def run_inside(self, number: int, x_BLD: Tensor, normed: Normed, given: Given) -> Branch:
        """A branch from behind its norm to before its last product."""
        return (self._run_self_attention, self._run_cross_attention, self._run_mlp)[number](x_BLD, normed, given)

    def own_heads(self, x_BLD: Tensor, normed: Normed, given: Given) -> tuple[list[Tensor], Gradients]:
        """q, k and v of self-attention: rows as the product gives them, and heads as attention takes them."""
        qkv = self.qkv.forward(normed.normed_ND)
        q, k = normed_heads(qkv[:2], self.norms[:2], given.rotary, len(x_BLD))
        return qkv, (q, k, heads(qkv[2], len(x_BLD), self.head_size))

    def _run_self_attention(self, x_BLD: Tensor, normed: Normed, given: Given) -> SelfAttention:
        qkv, own = self.own_heads(x_BLD, normed, given)
        return SelfAttention(x_BLD, normed, qkv, attend_forward(self.block.self_attn.attend, *own))

    def _run_cross_attention(self, x_BLD: Tensor, normed: Normed, given: Given) -> CrossAttention:
        q = self.q.forward(normed.normed_ND)
        context_rows = rows(given.context_BSD)
        kv, kv_hidden = self.kv.forward_any(context_rows)
        (q_heads,) = normed_heads(q, self.norms[2:3], None, len(x_BLD))
        (k_heads,) = normed_heads(kv[:1], self.norms[3:], None, len(x_BLD))
        v_heads = heads(kv[1], len(x_BLD), self.head_size)
        attended = attend_forward(self.block.cross_attn.attend, q_heads, k_heads, v_heads, given.zero_rows)
        return CrossAttention(x_BLD, normed, q, context_rows, kv, kv_hidden, attended)

    def _run_mlp(self, x_BLD: Tensor, normed: Normed, _given: Given) -> MLP:
        wide = self.wide.forward(normed.normed_ND)
        activated = torch.empty_like(wide[0])
        gelu(wide[0], activated)
        return MLP(x_BLD, normed, wide, activated)

    def output_of(self, branch: Branch) -> Output:
        """A branch's last product."""
        if isinstance(branch, MLP):
            return Output(*self.narrow.forward_late(branch.activated))
        linear = self.self_output if isinstance(branch, SelfAttention) else self.cross_output
        return Output(*linear.forward_late(rows(branch.attended.output)))


class _BackwardPass:
    """A block's backward pass, branch by branch from the last: from behind the branch's gate to the norm before it.

    dx_BLD: the gradient of the residual stream as far as the pass has come, without what comes through the norm reached
    last: dnormed_ND, the gradient of its result, which the next branch takes along with that norm, `reached`. found:
    gradients of the parameters of each part. partial_BPSD: sums for gradients of modulations, where they are wanted.
    """

    def __init__(self, fused: FusedBlock, tape: Tape, given: Given, dx_BLD: Tensor, wants_modulations: bool) -> None:
        self.fused, self.tape, self.rotary = fused, tape, given.rotary
        self.shift_scales, self.gates = zip(*map(_parts, given.modulations), strict=True)
        self.count = dx_BLD.shape[0] * dx_BLD.shape[1]
        self.dx_BLD = dx_BLD
        self.dnormed_ND: Tensor | None = None
        self.reached: tuple[Tensor | None, Normed | None, Modulation | None] = (None, None, None)
        self.found: dict[Joint | FusedNorm, list[Tensor]] = {}
        self.wants_modulations = wants_modulations
        self.partial_BPSD = empty_sums(dx_BLD, slots=9) if wants_modulations else None
        self.head_norms = HeadNormsBackward(fused.norms, rows(dx_BLD), len(dx_BLD))

    def pass_mlp(self) -> None:
        """The last branch, which comes first."""
        fused = self.fused
        x_BLD, normed, wide, activated, output = self.tape.take(self.wants_modulations)
        gradients, hidden_NR = self._pass_gate(2, output, fused.narrow), output.hidden_NR
        del output
        dactivated, self.found[fused.narrow] = fused.narrow.backward(gradients, activated, hidden_NR, True)
        del activated, gradients
        gradients = fused.wide.empty_gradients(self.count)
        gelu_backward(dactivated, wide[0], gradients[0])
        del dactivated, wide
        self.dnormed_ND, self.found[fused.wide] = fused.wide.backward(gradients, normed.normed_ND, None, True)
        self.reached = x_BLD, normed, self.shift_scales[2]

    def pass_cross_attention(self, wants_context: bool) -> Tensor | None:
        """Returns the gradient of the context (B, S, context width), if wanted."""
        fused = self.fused
        branch = self.tape.take(self.wants_modulations)
        dq, dk, dv = self._pass_attention(1, branch.attended, branch.output, fused.cross_output)
        gradients = fused.q.empty_gradients(self.count)
        self.head_norms.run(2, (dq,), branch.q, None, gradients)
        self.dnormed_ND, self.found[fused.q] = fused.q.backward(gradients, branch.normed.normed_ND, None, True)
        gradients = fused.kv.empty_gradients(len(branch.context_rows))
        self.head_norms.run(3, (dk, dv), branch.kv[:1], None, gradients)
        dcontext_NC, self.found[fused.kv] = fused.kv.backward(
            gradients, branch.context_rows, branch.kv_hidden, wants_context
        )
        self.reached = branch.x_BLD, branch.normed, self.shift_scales[1]
        return None if dcontext_NC is None else dcontext_NC.unflatten(0, (len(self.dx_BLD), -1))

    def pass_self_attention(self, wants_begin: bool) -> None:
        """wants_begin: whether the gradients of its norm and of the block's x are wanted."""
        fused = self.fused
        x_BLD, normed, qkv, attended, output = self.tape.take(self.wants_modulations)
        dq, dk, dv = self._pass_attention(0, attended, output, fused.self_output)
        del attended  # before the memory is asked for that is as large
        gradients = fused.qkv.empty_gradients(self.count)
        self.head_norms.run(0, (dq, dk, dv), qkv[:2], self.rotary, gradients)
        del dq, dk, dv, qkv
        self.dnormed_ND, self.found[fused.qkv] = fused.qkv.backward(gradients, normed.normed_ND, None, wants_begin)
        self.reached = x_BLD, normed, self.shift_scales[0]
        if wants_begin:
            self._pass_norm(None, None, self._sums(0, 0))

    def _pass_gate(self, number: int, output: Output, linear: Joint) -> list[Tensor]:
        """Passes the norm reached last, if any, and a branch's gate: the gradient of what the branch gave to it."""
        gradients = linear.empty_gradients(self.count)
        self._pass_norm(Gated(output.branch, self.gates[number]), gradients[0], self._sums(min(number + 1, 2), number))
        return gradients

    def _pass_norm(self, gated: Gated | None, dbranch_ND: Tensor | None, sums: ModulationSums | None) -> None:
        x_BLD, normed, shift_scale = self.reached
        self.dx_BLD = gated_norm_backward(
            self.dx_BLD, self.dnormed_ND, self.dx_BLD if x_BLD is None else x_BLD, normed, shift_scale, gated,
            dbranch_ND, sums,
        )  # fmt: skip
        self.dnormed_ND, self.reached = None, (None, None, None)

    def _sums(self, norm: int, gate: int) -> ModulationSums | None:
        """For shift and scale of one branch, counted from 0, and the gate of another."""
        return None if self.partial_BPSD is None else ModulationSums(self.partial_BPSD, 3 * norm, 3 * gate + 2)

    def _pass_attention(self, number: int, attended: Attended, output: Output, linear: Joint) -> Gradients:
        """Passes a branch's gate, its last product and attention: gradients of q, k and v (B, L, heads, D)."""
        gradients = self._pass_gate(number, output, linear)
        dattended, self.found[linear] = linear.backward(gradients, rows(attended.output), output.hidden_NR, True)
        del gradients
        return attend_backward(attended, dattended)


def _parts(modulation_BK: Tensor) -> tuple[Modulation, Tensor]:
    shift, scale, gate = modulation_BK.chunk(3, dim=1)
    return Modulation(shift, scale), gate
