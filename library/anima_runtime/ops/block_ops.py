"""What a transformer block computes between its matrix products, forward and backward, each as one pass over memory.

Written out in plain PyTorch, which runs anywhere and says what is meant; on CUDA `norm_kernels`, `head_kernels` and
`block_kernels` compute the same.
Rows N are the tokens of all samples, one after another. Statistics and sums are float32, or float64 for float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from library.anima_runtime.attention import RotaryTables
from library.anima_runtime.ops.kernels import kernels_of

_EPS = 1e-6


class Sum(NamedTuple):
    """base [N, K] + hidden [N, R] @ weight [R, K], added where it is used: the sum itself is never in memory.

    hidden and weight are None where there is nothing to add. Rows may be any distance apart.
    """

    base_NK: Tensor
    hidden_NR: Tensor | None = None
    weight_RK: Tensor | None = None

    def total(self) -> Tensor:
        """The sum, [N, K], in float32 or float64."""
        base = widened(self.base_NK)
        if self.hidden_NR is None:
            return base
        return base + self.hidden_NR.to(base.dtype) @ self.weight_RK.to(base.dtype)


class Normed(NamedTuple):
    """A LayerNorm's result: normed [N, D], and each row's mean and 1 / standard deviation, [N]."""

    normed_ND: Tensor
    mean_N: Tensor
    rstd_N: Tensor


class Gated(NamedTuple):
    """A branch's output, which a backward pass needs for `ModulationSums` only, and the gate [B, D] it passes."""

    branch: Sum | None
    gate_BD: Tensor


class ModulationSums(NamedTuple):
    """Where gradients of modulations go: partial sums [B, P, slots, D], from which `summed` makes gradients.

    shift and scale take norm_slot and the one behind it, the gate gate_slot.
    """

    partial_BPSD: Tensor
    norm_slot: int
    gate_slot: int


class Modulation(NamedTuple):
    """What a LayerNorm's result is changed by: result * (1 + scale) + shift, each [B, D]."""

    shift_BD: Tensor
    scale_BD: Tensor


def gated_norm(
    x_BLD: Tensor, gated: Gated | None, modulation: Modulation | None, normed_ND: Tensor | None = None
) -> tuple[Tensor, Normed | None]:
    """x + gate * branch, and its modulated LayerNorm, which is written to normed_ND; either may be left out."""
    if x_BLD.is_cuda:
        return kernels_of("norm").gated_norm(x_BLD, gated, modulation, normed_ND)
    if gated is not None:
        branch_BLD = gated.branch.total().view_as(x_BLD)
        x_BLD = (widened(x_BLD) + widened(gated.gate_BD)[:, None] * branch_BLD).to(x_BLD.dtype)
    if modulation is None:
        return x_BLD, None
    wide = widened(x_BLD)
    mean = wide.mean(-1, keepdim=True)
    rstd = (wide.var(-1, unbiased=False, keepdim=True) + _EPS).rsqrt()
    scale, shift = widened(modulation.scale_BD)[:, None], widened(modulation.shift_BD)[:, None]
    normed_ND.copy_(((wide - mean) * rstd * (1 + scale) + shift).flatten(0, 1))
    return x_BLD, Normed(normed_ND, mean.flatten(), rstd.flatten())


def gated_norm_backward(
    dx_BLD: Tensor,
    dnormed_ND: Tensor | None,
    x_BLD: Tensor,
    normed: Normed | None,
    modulation: Modulation | None,
    gated: Gated | None,
    dbranch_ND: Tensor | None,
    sums: ModulationSums | None,
) -> Tensor:
    """Gradients of what went into `gated_norm`, which returned x and normed.

    dx, dnormed: of its results. Returns that of the x that went in [B, L, D]; that of the branch is written to
    dbranch, and those of shift, scale and gate go to `sums`, where they are wanted.
    """
    if dx_BLD.is_cuda:
        return kernels_of("norm").gated_norm_backward(
            dx_BLD, dnormed_ND, x_BLD, normed, modulation, gated, dbranch_ND, sums
        )
    wide = widened(dx_BLD)
    if dnormed_ND is not None:
        rstd = normed.rstd_N.view(*wide.shape[:2], 1)
        unit = (widened(x_BLD) - normed.mean_N.view(*wide.shape[:2], 1)) * rstd
        d = widened(dnormed_ND).view_as(wide)
        if sums is not None:
            sums.partial_BPSD[:, 0, sums.norm_slot] = d.sum(1)
            sums.partial_BPSD[:, 0, sums.norm_slot + 1] = (d * unit).sum(1)
        d = d * (1 + widened(modulation.scale_BD)[:, None])
        across, along = d.mean(-1, keepdim=True), (d * unit).mean(-1, keepdim=True)
        wide = wide + rstd * (d - across - unit * along)
    if gated is not None:
        if sums is not None:
            sums.partial_BPSD[:, 0, sums.gate_slot] = (wide * gated.branch.total().view_as(wide)).sum(1)
        dbranch_ND.copy_((wide * widened(gated.gate_BD)[:, None]).flatten(0, 1))
    return wide.to(dx_BLD.dtype)


def empty_sums(x_BLD: Tensor, slots: int) -> Tensor:
    """Partial sums for `gated_norm_backward` of such x, [B, P, slots, D]; every slot must be written."""
    samples, length, width = x_BLD.shape
    programs = kernels_of("norm").modulation_programs(samples, length) if x_BLD.is_cuda else 1
    dtype = torch.float64 if x_BLD.dtype == torch.float64 else torch.float32
    return x_BLD.new_empty(samples, programs, slots, width, dtype=dtype)


def summed(partial_BPSD: Tensor) -> Tensor:
    """The sums [B, slots * D] of partial sums."""
    partial_BPK = partial_BPSD.flatten(2)
    return kernels_of("block").sum_programs(partial_BPK) if partial_BPK.is_cuda else partial_BPK.sum(1)


def head_norms(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], rotary: RotaryTables | None, length: int
) -> list[Tensor]:
    """RMSNorm of each head, and its rotation, if any, of one or two inputs, q and k: [N, heads * D] each.

    inputs: alike in shape and strides. weights: [D] each, float32 at least. rotary: of `length` positions, which the
    rows pass through again and again.
    """
    if inputs[0].is_cuda:
        return kernels_of("head").head_norms(inputs, weights, rotary, length)
    outputs = []
    for x_NE, weight_D in zip(inputs, weights, strict=True):
        heads = widened(x_NE).unflatten(-1, (-1, len(weight_D)))
        heads = F.rms_norm(heads, weight_D.shape, weight_D.to(heads.dtype), _EPS)
        if rotary is not None:
            heads = _turn(heads, rotary, length, forwards=True)
        outputs.append(heads.flatten(1).to(x_NE.dtype))
    return outputs


def head_norms_backward(
    gradients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    rotary: RotaryTables | None,
    length: int,
    into: Sequence[Tensor],
    sums_MPD: Tensor | None,
) -> None:
    """Writes the gradients of `head_norms`' inputs, alike in strides, to `into`.

    Those of the weights go to sums, where they are wanted: partial sums, from which `summed` makes gradients. A
    gradient more than there are inputs, v's, is copied to its place.
    """
    if gradients[0].is_cuda:
        kernels_of("head").head_norms_backward(gradients, inputs, weights, rotary, length, into, sums_MPD)
        return
    for number, (x_NE, weight_D) in enumerate(zip(inputs, weights, strict=True)):
        heads = widened(x_NE).unflatten(-1, (-1, len(weight_D)))
        rstd = (heads.square().mean(-1, keepdim=True) + _EPS).rsqrt()
        unit = heads * rstd
        d = widened(gradients[number]).unflatten(-1, (-1, len(weight_D)))
        if rotary is not None:
            d = _turn(d, rotary, length, forwards=False)
        if sums_MPD is not None:
            sums_MPD[number, 0] = (d * unit).sum((0, 1))
        d = d * weight_D.to(d.dtype)
        into[number].copy_((rstd * (d - unit * (d * unit).mean(-1, keepdim=True))).flatten(1))
    if len(gradients) > len(inputs):
        into[len(inputs)].copy_(gradients[-1])


def empty_head_sums(x_NE: Tensor, norms: int, head_size: int) -> Tensor:
    """Partial sums for `head_norms_backward` of so many norms, of about as many rows as x: [M, P, D]."""
    programs = kernels_of("head").head_programs(*x_NE.shape) if x_NE.is_cuda else 1
    return x_NE.new_empty(norms, programs, head_size, dtype=torch.promote_types(x_NE.dtype, torch.float32))


def gelu(x_NE: Tensor, out_NE: Tensor) -> None:
    """Writes the exact GELU of x, whose rows follow each other, to out."""
    if x_NE.is_cuda:
        kernels_of("block").gelu(x_NE, out_NE)
    else:
        out_NE.copy_(F.gelu(widened(x_NE)))


def gelu_backward(dout_NE: Tensor, x_NE: Tensor, dx_NE: Tensor) -> None:
    """Writes the gradient of `gelu`'s x to dx."""
    if x_NE.is_cuda:
        kernels_of("block").gelu_backward(dout_NE, x_NE, dx_NE)
        return
    u = widened(x_NE)
    slope = 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    dx_NE.copy_(widened(dout_NE) * slope)


def add_zero_keys(out_BLHD: Tensor, lse_BHL: Tensor, count: int) -> Tensor:
    """Changes attention's result to what it is with so many more keys and values of zeros; see `attention_passes`.

    lse: the logarithm of the sum of exp(logit) over a query's keys, float32 at least. Returns that over all of them.
    """
    if out_BLHD.is_cuda:
        return kernels_of("block").add_zero_keys(out_BLHD, lse_BHL, count)
    total = torch.logaddexp(lse_BHL, torch.full_like(lse_BHL, math.log(count)))
    out_BLHD *= torch.exp(lse_BHL - total).transpose(1, 2)[..., None].to(out_BLHD.dtype)
    return total


class ManyCopies:
    """Copies of matrices, times a factor, into places of another dtype: (source, place, factor) each."""

    def __init__(self, copies: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        self._copies = copies
        self._plan = None

    @torch.no_grad()
    def run(self) -> None:
        """Copies what the sources, which lie where they are, now hold."""
        if self._copies and self._copies[0][1].is_cuda:
            self._plan = kernels_of("block").copy_all(self._copies, self._plan)
            return
        for source, place, factor in self._copies:
            torch.mul(source, factor, out=place)


def kernel_obstacle(device: torch.device) -> str | None:
    """Why the kernels do not run there, found by running one; None where they do."""
    x_NE = torch.zeros(1, 16, dtype=torch.bfloat16, device=device)
    try:
        kernels_of("block").gelu(x_NE, torch.empty_like(x_NE))
    except Exception as error:  # no C compiler, no headers of Python, a card that Triton does not know, and more
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return None


def widened(x: Tensor) -> Tensor:
    """In float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _turn(heads_NHD: Tensor, rotary: RotaryTables, length: int, forwards: bool) -> Tensor:
    """Rotates dimension k with k + D/2, or back."""
    cos, sin = (table.to(heads_NHD.dtype).repeat(len(heads_NHD) // length, 1)[:, None] for table in rotary)
    sin = sin if forwards else -sin
    first, second = heads_NHD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
