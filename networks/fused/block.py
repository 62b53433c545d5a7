"""One block of the transformer with its adapters, written out; backward in `backward.py`.

Products go through `joint_linear`, what lies between them through `block_ops`, attention through the model's own
function, or a kernel in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from library.anima_runtime.memory.weight_swap import SwappedBlock
from library.anima_runtime.ops.attention_passes import (
    Gradients,
    attend_forward,
    attend_normed_forward,
    norms_heads,
)
from library.anima_runtime.ops.block_ops import Gated, Normed, Sum, gated_norm, gelu
from library.anima_runtime.transformer import Block
from networks.adapter import Adapter
from networks.fused.parts import Parts, heads, normed_heads, rows
from networks.fused.tape import MLP, Branch, CrossAttention, Given, Output, SelfAttention, Tape


class FusedBlock:
    """One block. adapters: by the path of the module in the block, those it has. swapped: itself, if its weights are.

    Each branch is x + gate * f(LayerNorm(x) * (1 + scale) + shift); `gated_norm` takes the end of one together with the
    beginning of the next.
    """

    def __init__(self, block: Block, adapters: Mapping[str, Adapter], swapped: SwappedBlock | None = None) -> None:
        parts = Parts(block, adapters, swapped)
        self.block, self.swapped = block, swapped
        self.head_size = block.self_attn.head_size
        self.qkv = parts.joint("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.self_output = parts.joint("self_attn.output_proj")
        self.q = parts.joint("cross_attn.q_proj")
        self.cross_output = parts.joint("cross_attn.output_proj")
        self.wide = parts.joint("mlp.layer1")
        self.narrow = parts.joint("mlp.layer2")
        if swapped is not None:
            block.to(swapped.swap.device)  # all but what is swapped, which is there by now
            block.register_forward_pre_hook(lambda *_: swapped.enter(backward=False))  # where it is run as it is
        self.norms = [parts.norm(f"{name}.{part}_norm") for name in ("self_attn", "cross_attn") for part in ("q", "k")]
        self.joints = (self.qkv, self.self_output, self.q, self.cross_output, self.wide, self.narrow)
        self.entries = (self.qkv, self.q, self.wide)  # what each branch's norm goes into

    def parameters(self) -> list[nn.Parameter]:
        """All adapters', in the order of `block_backward`'s gradients."""
        return [parameter for part in (*self.joints, *self.norms) for parameter in part.parameters()]

    def forward(self, x_BLD: Tensor, given: Given, tape: Tape | None) -> Tensor:
        """As `Block.forward`: x (B, L, D). What `block_backward` needs goes to the tape, if there is one."""
        if self.swapped is not None:
            self.swapped.enter(backward=False)
        former = None
        for number in range(3):
            x_BLD, former = self.run(number, x_BLD, former, given, tape)
        return gated_norm(x_BLD, Gated(former, given.parts(2)[1]), None)[0]

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
        gated = None if former is None else Gated(former, given.parts(number - 1)[1])
        into = self.entries[number].empty_input(x_BLD.shape[0] * x_BLD.shape[1])
        return gated_norm(x_BLD, gated, given.parts(number)[0], into)

    def run_inside(self, number: int, x_BLD: Tensor, normed: Normed, given: Given) -> Branch:
        """A branch from behind its norm to before its last product."""
        return (self._run_self_attention, self._run_cross_attention, self._run_mlp)[number](x_BLD, normed, given)

    def self_heads(self, qkv: Sequence[Tensor], given: Given, samples: int) -> Gradients:
        """q, k and v of self-attention, rows as the product gives them, as attention takes them."""
        q, k = normed_heads(qkv[:2], self.norms[:2], given.rotary, samples)
        return q, k, heads(qkv[2], samples, self.head_size)

    def cross_heads(self, q: Sequence[Tensor], given: Given, samples: int) -> tuple[Gradients, bool]:
        """The same of cross-attention, and whether q and k come before their norms, which attention makes then."""
        q_heads, k_heads, v_heads = (
            heads(x_NE, samples, self.head_size) for x_NE in (*q, given.context.k_NE, given.context.v_NE)
        )
        if norms_heads(self.block.cross_attn.attend, q_heads, k_heads):
            return (q_heads, k_heads, v_heads), True
        (q_heads,) = normed_heads(q, self.norms[2:3], None, samples)
        (k_heads,) = normed_heads([given.context.k_NE], self.norms[3:], None, samples)
        return (q_heads, k_heads, v_heads), False

    def heads_of(self, branch: SelfAttention | CrossAttention, given: Given, samples: int) -> Gradients:
        """Those of a branch whose products are there."""
        if isinstance(branch, SelfAttention):
            return self.self_heads(branch.qkv, given, samples)
        return self.cross_heads(branch.q, given, samples)[0]

    def _run_self_attention(self, x_BLD: Tensor, normed: Normed, given: Given) -> SelfAttention:
        qkv = self.qkv.forward(normed.normed_ND)
        attended = attend_forward(self.block.self_attn.attend, *self.self_heads(qkv, given, len(x_BLD)))
        return SelfAttention(x_BLD, normed, qkv, attended)

    def _run_cross_attention(self, x_BLD: Tensor, normed: Normed, given: Given) -> CrossAttention:
        q = self.q.forward(normed.normed_ND)
        own, are_to_be_normed = self.cross_heads(q, given, len(x_BLD))
        if are_to_be_normed:
            weights = self.norms[2].weight, self.norms[3].weight
            attended = attend_normed_forward(*own, weights, given.zero_rows)
        else:
            attended = attend_forward(self.block.cross_attn.attend, *own, given.zero_rows)
        return CrossAttention(x_BLD, normed, q, attended)

    def _run_mlp(self, x_BLD: Tensor, normed: Normed, _given: Given) -> MLP:
        wide = self.wide.forward(normed.normed_ND)
        return MLP(x_BLD, normed, wide, activated(wide))

    def output_of(self, branch: Branch) -> Output:
        """A branch's last product."""
        if isinstance(branch, MLP):
            return Output(*self.narrow.forward_late(branch.activated))
        linear = self.self_output if isinstance(branch, SelfAttention) else self.cross_output
        return Output(*linear.forward_late(rows(branch.attended.output)))


def activated(wide: Sequence[Tensor]) -> Tensor:
    """The MLP's hidden activations of its first product."""
    out_NE = torch.empty_like(wide[0])
    gelu(wide[0], out_NE)
    return out_NE
