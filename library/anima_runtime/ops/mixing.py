"""What a Kronecker product w1 ⊗ w2 of a small matrix and a large one takes beside plain matrix products.

Several Linears M may have theirs side by side. Rows N are tokens, each seen as parts: I of K columns before w2 [J, K],
and O of J columns behind it. Written out in plain PyTorch; on CUDA `mixing_kernels` computes the same, each in one pass
over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.anima_runtime.ops.kernels import kernels_of

# Times the number of an element, and of that the upper half: as good as chance, and the same at each call.
CHANCE = 2654435761  # 2³² over the golden ratio


def merge(weight: Tensor, w1_MOI: Tensor, w2_MJK: Tensor, out: Tensor) -> None:
    """Writes weight + w1 ⊗ w2 to out; both [M * O * J, I * K], in order of memory.

    bfloat16 is rounded up or down by chance, in proportion to what is nearer. To the nearest, a bfloat16 weight would
    stay as it is under what is less than half its last digit, which the first steps of a training are.
    """
    if weight.is_cuda:
        kernels_of("mixing").merge(weight, w1_MOI, w2_MJK, out)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    deltas = [torch.kron(w1.to(wide), w2.to(wide)) for w1, w2 in zip(w1_MOI, w2_MJK, strict=True)]
    merged = weight.to(wide) + torch.cat(deltas)
    out.copy_(_rounded_by_chance(merged) if out.dtype == torch.bfloat16 else merged)


def mix(v_MPQ: Tensor, a_MNPJ: Tensor, b_MNQJ: Tensor, mixed_MNPJ: Tensor) -> Tensor:
    """Writes Σ over q of v[p, q] b[n, q] to mixed; returns Σ over n and j of a[n, p, j] b[n, q, j], [M, P, Q].

    The latter, in float32 at least, is v's gradient where a is that of mixed. Tensors may be views of any strides, but
    for the last dimension, which lies in order.
    """
    if b_MNQJ.is_cuda and kernels_of("mixing").mixes(v_MPQ):
        return kernels_of("mixing").mix(v_MPQ, a_MNPJ, b_MNQJ, mixed_MNPJ)
    mixed_MNPJ.copy_(v_MPQ[:, None] @ b_MNQJ)
    products_MNPQ = a_MNPJ @ b_MNQJ.transpose(2, 3)
    return products_MNPQ.sum(1, dtype=torch.promote_types(v_MPQ.dtype, torch.float32))


def _rounded_by_chance(x: Tensor) -> Tensor:
    """float32 that bfloat16 can hold: its bits above the last 16, after some number below 2¹⁶ was added to them."""
    chance = (torch.arange(x.numel(), device=x.device) * CHANCE & 0xFFFFFFFF) >> 16
    bits = x.view(torch.int32) + chance.view_as(x).to(torch.int32) & -65536
    return torch.where(x.isnan(), x, bits.view(torch.float32))
