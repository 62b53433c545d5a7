"""One block of the LLM adapter with its adapters, written out forward and backward.

Each branch is x + f(RMSNorm(x)). A branch's end is added together with the beginning of the next, so a block takes the
end of the one before it and leaves its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from library.anima_runtime.attention import RotaryTables
from library.anima_runtime.llm_adapter import AdapterBlock
from library.anima_runtime.ops.attention_passes import Attended, Gradients, attend_backward, attend_masked_forward
from library.anima_runtime.ops.block_ops import Sum, gelu, gelu_backward
from library.anima_runtime.ops.residual_norm import RootNormed, residual_norm, residual_norm_backward
from networks.adapter import Adapter
from networks.fused.joint_linear import Passed
from networks.fused.joint_lokr import JointLoKr
from networks.fused.parts import FusedNorm, HeadNormsBackward, Joint, Parts, heads, normed_heads, rows

Found = dict[Joint | FusedNorm, list[Tensor]]
GradientRooms = Mapping[Joint, Sequence[Tensor]]


class Surroundings(NamedTuple):
    """What all blocks share: the number of samples, positions' rotations, and what is added to scores, [B, L].

    source_: the same of the Qwen states.
    """

    samples: int
    rotary: RotaryTables
    bias_BL: Tensor
    source_rotary: RotaryTables
    source_bias_BS: Tensor


class Rooms(NamedTuple):
    """Where the forward pass puts what parameters' gradients are made of, by the joint that it goes into or out of."""

    inputs: Mapping[Joint, Sequence[Tensor]]
    outputs: Mapping[Joint, Sequence[Tensor | None]]


class Activations(NamedTuple):
    """What a block's forward pass leaves for the backward pass."""

    x_first: Tensor
    first: RootNormed
    qkv: list[Tensor]
    self_attended: Attended
    self_hidden: Tensor | None
    x_second: Tensor
    second: RootNormed
    q: Tensor
    k_source: Tensor
    cross_attended: Attended
    cross_hidden: Tensor | None
    x_third: Tensor
    third: RootNormed
    wide: Tensor
    activated: Tensor
    narrow_hidden: Tensor | None


class FusedLLMBlock:
    """One block. adapters: by the path of the module in the block, those it has.

    The k and v of its cross-attention, which are of the source, come from outside.
    """

    def __init__(self, block: AdapterBlock, adapters: Mapping[str, Adapter]) -> None:
        parts = Parts(block, adapters)
        self.head_size = block.self_attn.head_size
        self.qkv = parts.joint("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.self_output = parts.joint("self_attn.o_proj")
        self.q = parts.joint("cross_attn.q_proj")
        self.cross_output = parts.joint("cross_attn.o_proj")
        self.wide = parts.joint("mlp.0")
        self.narrow = parts.joint("mlp.2")
        self.head_norms = [
            parts.norm(f"{name}.{part}_norm") for name in ("self_attn", "cross_attn") for part in ("q", "k")
        ]
        self.norms = [parts.norm(f"norm_{name}") for name in ("self_attn", "cross_attn", "mlp")]
        self.joints = (self.qkv, self.self_output, self.q, self.cross_output, self.wide, self.narrow)
        # Whose inputs and outputs go to `Rooms`; attention's results lie where it puts them.
        self.fed = (self.qkv, self.q, self.wide, self.narrow)
        self.late = (self.self_output, self.cross_output, self.narrow)

    def forward(
        self,
        x_ND: Tensor,
        branch: Sum | None,
        k_source_NE: Tensor,
        v_source_NE: Tensor,
        around: Surroundings,
        rooms: Rooms,
    ) -> tuple[Tensor, Sum, Activations]:
        """The stream before the block's last branch, that branch, and what `backward` needs.

        branch: the last of the block before. k, v: products of the source, before k's norm.
        """
        x_first, first = residual_norm(x_ND, branch, self.norms[0].weight, rooms.inputs[self.qkv][0])
        qkv = self.qkv.forward(first.normed_ND)
        q, k = normed_heads(qkv[:2], self.head_norms[:2], around.rotary, around.samples)
        v = heads(qkv[2], around.samples, self.head_size)
        self_attended = attend_masked_forward(q, k, v, around.bias_BL)
        self_output, self_hidden = self._late(self.self_output, rows(self_attended.output), rooms)

        x_second, second = residual_norm(x_first, self_output, self.norms[1].weight, rooms.inputs[self.q][0])
        (q_cross,) = self.q.forward(second.normed_ND)
        (q,) = normed_heads([q_cross], self.head_norms[2:3], around.rotary, around.samples)
        (k,) = normed_heads([k_source_NE], self.head_norms[3:], around.source_rotary, around.samples)
        v = heads(v_source_NE, around.samples, self.head_size)
        cross_attended = attend_masked_forward(q, k, v, around.source_bias_BS)
        cross_output, cross_hidden = self._late(self.cross_output, rows(cross_attended.output), rooms)

        x_third, third = residual_norm(x_second, cross_output, self.norms[2].weight, rooms.inputs[self.wide][0])
        (wide,) = self.wide.forward(third.normed_ND)
        activated = rooms.inputs[self.narrow][0]
        gelu(wide, activated)
        narrow, narrow_hidden = self._late(self.narrow, activated, rooms)
        return x_third, narrow, Activations(
            x_first, first, qkv, self_attended, self_hidden, x_second, second, q_cross, k_source_NE, cross_attended,
            cross_hidden, x_third, third, wide, activated, narrow_hidden,
        )  # fmt: skip

    def backward(
        self,
        saved: Activations,
        around: Surroundings,
        dk_source_NE: Tensor,
        dv_source_NE: Tensor,
        dx_out_ND: Tensor | None,
        sums_PSD: Tensor,
        rooms: GradientRooms,
    ) -> tuple[Found, dict[Joint, Passed]]:
        """The gradients of the parameters, or what they can be made of; those of `norms` as partial sums in `sums`.

        rooms: where gradients of the joints' outputs go; in `narrow`'s is that of the stream behind the block, which is
        that of its last branch. dx_out: where that of the stream before the block goes, if wanted. dk_source,
        dv_source: where those of k and v go.
        """
        done = _BackwardPass(self, saved, around, sums_PSD, rooms)
        done.pass_mlp()
        done.pass_cross_attention(dk_source_NE, dv_source_NE)
        done.pass_self_attention(dx_out_ND)
        return done.found | done.head_norms.found(), done.passed

    def _late(self, joint: Joint, x_NI: Tensor, rooms: Rooms) -> tuple[Sum, Tensor | None]:
        return joint.forward_late(x_NI, rooms.outputs[joint][0])


class _BackwardPass:
    """A block's backward pass, branch by branch from the last.

    The gradient of the stream behind a branch is the branch's as well, and lies where its last product wants it.
    found: gradients of the parameters of each part. passed: what those of others can be made of.
    """

    def __init__(
        self,
        fused: FusedLLMBlock,
        saved: Activations,
        around: Surroundings,
        sums_PSD: Tensor,
        rooms: GradientRooms,
    ) -> None:
        self.fused, self.saved, self.around, self.sums_PSD, self.rooms = fused, saved, around, sums_PSD, rooms
        self.found: Found = {}
        self.passed: dict[Joint, Passed] = {}
        self.head_norms = HeadNormsBackward(fused.head_norms, max(saved.q, saved.k_source, key=len), around.samples)

    def pass_mlp(self) -> None:
        fused, saved = self.fused, self.saved
        dactivated = self._pass_joint(fused.narrow, saved.activated, saved.narrow_hidden)
        gelu_backward(dactivated, saved.wide, self.rooms[fused.wide][0])
        dnormed = self._pass_joint(fused.wide, saved.third.normed_ND)
        self._pass_norm(2, fused.narrow, dnormed, saved.x_third, saved.third, self.rooms[fused.cross_output][0])

    def pass_cross_attention(self, dk_source_NE: Tensor, dv_source_NE: Tensor) -> None:
        fused, saved, around = self.fused, self.saved, self.around
        dq, dk, dv = self._pass_attention(fused.cross_output, saved.cross_attended, saved.cross_hidden)
        self.head_norms.run(2, (dq,), [saved.q], around.rotary, self.rooms[fused.q])
        into = dk_source_NE, dv_source_NE
        self.head_norms.run(3, (dk, dv), [saved.k_source], around.source_rotary, into)
        dnormed = self._pass_joint(fused.q, saved.second.normed_ND)
        self._pass_norm(1, fused.cross_output, dnormed, saved.x_second, saved.second, self.rooms[fused.self_output][0])

    def pass_self_attention(self, dx_out_ND: Tensor | None) -> None:
        fused, saved, around = self.fused, self.saved, self.around
        dq, dk, dv = self._pass_attention(fused.self_output, saved.self_attended, saved.self_hidden)
        self.head_norms.run(0, (dq, dk, dv), saved.qkv[:2], around.rotary, self.rooms[fused.qkv])
        dnormed = self._pass_joint(fused.qkv, saved.first.normed_ND, wants_input=dx_out_ND is not None)
        if dx_out_ND is not None:
            self._pass_norm(0, fused.self_output, dnormed, saved.x_first, saved.first, dx_out_ND)

    def _pass_joint(
        self, joint: Joint, x_NI: Tensor, hidden_NR: Tensor | None = None, wants_input: bool = True
    ) -> Tensor | None:
        """The gradient of x, if wanted, from what is in the joint's room."""
        gradients = self.rooms[joint]
        if isinstance(joint, JointLoKr):
            dx_NI, self.found[joint] = joint.backward(gradients, x_NI, None, wants_input)
            return dx_NI
        passed = self.passed[joint] = joint.pass_hidden(gradients, x_NI, hidden_NR)
        return joint.input_gradient(passed) if wants_input else None

    def _pass_norm(
        self, number: int, branch: Joint, dnormed_ND: Tensor, x_ND: Tensor, normed: RootNormed, dx_out_ND: Tensor
    ) -> None:
        """branch: whose room has the gradient of the stream behind it."""
        norm = self.fused.norms[number]
        sums_PD = None if norm.adapter is None else self.sums_PSD[:, number]
        residual_norm_backward(self.rooms[branch][0], dnormed_ND, x_ND, normed, norm.weight, dx_out_ND, sums_PD)

    def _pass_attention(self, output: Joint, attended: Attended, hidden_NR: Tensor | None) -> Gradients:
        """Gradients of q, k and v (B, L, heads, D), from that of the output."""
        return attend_backward(attended, self._pass_joint(output, rows(attended.output), hidden_NR))
