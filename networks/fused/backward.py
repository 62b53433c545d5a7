"""The backward pass of a block of the transformer with its adapters; see `block`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from library.anima_runtime.ops.attention_passes import Attended, Gradients, attend_backward
from library.anima_runtime.ops.block_ops import (
    Gated,
    Modulation,
    ModulationSums,
    Normed,
    empty_sums,
    gated_norm_backward,
    gelu_backward,
    summed,
)
from networks.fused.block import FusedBlock
from networks.fused.parts import FusedNorm, HeadNormsBackward, Joint, rows
from networks.fused.tape import Given, Output, Tape


def block_backward(
    fused: FusedBlock, dx_BLD: Tensor, tape: Tape, given: Given, wants_x: bool, wants_modulations: bool
) -> tuple[Tensor | None, Sequence[Tensor | None], list[Tensor]]:
    """Gradients of a block's x, modulations and parameters; None for those not wanted.

    Those of the context's keys and values go to their places.
    """
    if fused.swapped is not None:
        fused.swapped.enter(backward=True, ends=not wants_x)
    done = _BackwardPass(fused, tape, given, dx_BLD, wants_modulations)
    done.pass_mlp()
    done.pass_cross_attention()
    done.pass_self_attention(wants_x or wants_modulations)
    dmodulations: Sequence[Tensor | None] = [None] * 3
    if done.partial_BPSD is not None:
        dmodulations = summed(done.partial_BPSD).to(given.modulations[0].dtype).chunk(3, dim=1)
    done.found |= done.head_norms.found()
    gradients = [gradient for part in (*fused.joints, *fused.norms) for gradient in done.found[part]]
    return done.dx_BLD if wants_x else None, dmodulations, gradients


class _BackwardPass:
    """A block's backward pass, branch by branch from the last: from behind the branch's gate to the norm before it.

    dx_BLD: the gradient of the residual stream as far as the pass has come, without what comes through the norm reached
    last: dnormed_ND, the gradient of its result, which the next branch takes along with that norm, `reached`. found:
    gradients of the parameters of each part. partial_BPSD: sums for gradients of modulations, where they are wanted.
    """

    def __init__(self, fused: FusedBlock, tape: Tape, given: Given, dx_BLD: Tensor, wants_modulations: bool) -> None:
        self.fused, self.tape, self.rotary, self.context = fused, tape, given.rotary, given.context
        self.shift_scales, self.gates = zip(*map(given.parts, range(3)), strict=True)
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

    def pass_cross_attention(self) -> None:
        """The gradients of the context's keys and values go to their places."""
        fused = self.fused
        branch = self.tape.take(self.wants_modulations)
        dq, dk, dv = self._pass_attention(1, branch.attended, branch.output, fused.cross_output)
        gradients = fused.q.empty_gradients(self.count)
        self.head_norms.run(2, (dq,), branch.q, None, gradients)
        self.dnormed_ND, self.found[fused.q] = fused.q.backward(gradients, branch.normed.normed_ND, None, True)
        self.head_norms.run(3, (dk, dv), [self.context.k_NE], None, self.context.gradients())
        self.reached = branch.x_BLD, branch.normed, self.shift_scales[1]

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
