"""A branch's end together with the next one's beginning, of blocks whose norm is RMSNorm: as `block_ops`' `gated_norm`.

Written out in plain PyTorch; on CUDA `residual_norm_kernels` computes the same in one pass over memory.
Rows N are the tokens of all samples, one after another. Statistics and sums are float32, or float64 for float64.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from library.anima_runtime.ops.block_ops import Sum, widened
from library.anima_runtime.ops.kernels import kernels_of

_EPS = 1e-6


class RootNormed(NamedTuple):
    """An RMSNorm's result: normed [N, D], and each row's 1 / root of the mean square, [N]."""

    normed_ND: Tensor
    rstd_N: Tensor


def residual_norm(
    x_ND: Tensor, branch: Sum | None, weight_D: Tensor | None, normed_ND: Tensor | None = None
) -> tuple[Tensor, RootNormed | None]:
    """x + branch, and its RMSNorm, which is written to normed_ND; either may be left out. weight: float32 at least."""
    if x_ND.is_cuda:
        return kernels_of("residual_norm").residual_norm(x_ND, branch, weight_D, normed_ND)
    if branch is not None:
        x_ND = (widened(x_ND) + branch.total()).to(x_ND.dtype)
    if weight_D is None:
        return x_ND, None
    wide = widened(x_ND)
    rstd = (wide.square().mean(-1, keepdim=True) + _EPS).rsqrt()
    normed_ND.copy_(wide * rstd * weight_D.to(wide.dtype))
    return x_ND, RootNormed(normed_ND, rstd.flatten())


def residual_norm_backward(
    dx_ND: Tensor | None,
    dnormed_ND: Tensor,
    x_ND: Tensor,
    normed: RootNormed,
    weight_D: Tensor,
    dx_out_ND: Tensor,
    sums_PD: Tensor | None,
) -> None:
    """Writes the gradient of what went into `residual_norm`, x and branch alike, to dx_out; it returned x and normed.

    dx, dnormed: of its results, None for zero. sums: where partial sums of the weight's gradient go, of which
    `empty_weight_sums` makes room, if wanted.
    """
    if dnormed_ND.is_cuda:
        kernels_of("residual_norm").residual_norm_backward(
            dx_ND, dnormed_ND, x_ND, normed, weight_D, dx_out_ND, sums_PD
        )
        return
    rstd = normed.rstd_N[:, None]
    unit, d = widened(x_ND) * rstd, widened(dnormed_ND)
    if sums_PD is not None:
        sums_PD[0] = (d * unit).sum(0)
    d = d * weight_D.to(d.dtype)
    dx = rstd * (d - unit * (d * unit).mean(-1, keepdim=True))
    dx_out_ND.copy_(dx if dx_ND is None else widened(dx_ND) + dx)


def empty_weight_sums(count: int, width: int, slots: int, like: Tensor) -> Tensor:
    """Partial sums for `residual_norm_backward` of so many rows, [P, slots, D]; a slot has what is written to it."""
    programs = kernels_of("residual_norm").backward_programs(count) if like.is_cuda else 1
    return like.new_empty(programs, slots, width, dtype=widened(like[:0]).dtype)
