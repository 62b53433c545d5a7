"""Triton kernels of `residual_norm`, whose functions say what each computes. Imported on CUDA only.

Sums over rows are left as one partial sum a program, added afterwards in a fixed order, so that two runs give the same
bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from library.anima_runtime.ops.block_ops import Sum
from library.anima_runtime.ops.residual_norm import RootNormed

_EPS = 1e-6
# Rows a program takes at a time, and its warps. PROGRAMS: of a launch, each of which takes rows again and again.
LAUNCH = {"ROWS": 1, "num_warps": 4}
BACKWARD_LAUNCH = {"ROWS": 2, "num_warps": 4, "PROGRAMS": 264}


@triton.jit
def _residual_norm(
    x, base, hidden, weight, hidden_stride, weight_stride, norm, x_out, normed, rstd_out,
    count, x_stride, base_stride, normed_stride, eps,
    WIDTH: tl.constexpr, RANK: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = places < count
    rows = places.to(tl.int64)
    columns = tl.arange(0, WIDTH)
    here = rows[:, None] * x_stride + columns[None, :]
    value = tl.load(x + here, mask=kept[:, None], other=0.0).to(tl.float32)
    if HAS_BRANCH:
        there = rows[:, None] * base_stride + columns[None, :]
        value += tl.load(base + there, mask=kept[:, None], other=0.0).to(tl.float32)
        for rank in tl.static_range(RANK):  # not by matrix units, which take 16 rows and more
            h = tl.load(hidden + rows * hidden_stride + rank, mask=kept, other=0.0).to(tl.float32)
            value += h[:, None] * tl.load(weight + rank * weight_stride + columns).to(tl.float32)[None, :]
        rounded = value.to(x_out.dtype.element_ty)
        tl.store(x_out + rows[:, None] * WIDTH + columns[None, :], rounded, mask=kept[:, None])
        value = rounded.to(tl.float32)
    if HAS_NORM:
        rstd = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
        tl.store(rstd_out + rows, rstd, mask=kept)
        value *= rstd[:, None] * tl.load(norm + columns)[None, :]
        there = rows[:, None] * normed_stride + columns[None, :]
        tl.store(normed + there, value.to(normed.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _residual_norm_backward(
    dx, dnormed, x, rstd_in, norm, dx_out, sums, count, x_stride, dx_stride, dx_out_stride, sums_stride,
    WIDTH: tl.constexpr, HAS_DX: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, WIDTH)
    scale = tl.load(norm + columns)[None, :]
    dweight = tl.zeros((WIDTH,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        places = first + tl.arange(0, ROWS)
        kept = places < count
        rows = places.to(tl.int64)
        rstd = tl.load(rstd_in + rows, mask=kept, other=0.0)[:, None]
        there = rows[:, None] * x_stride + columns[None, :]
        unit = tl.load(x + there, mask=kept[:, None], other=0.0).to(tl.float32) * rstd
        there = rows[:, None] * WIDTH + columns[None, :]
        d = tl.load(dnormed + there, mask=kept[:, None], other=0.0).to(tl.float32)
        if WEIGHT:
            dweight += tl.sum(d * unit, 0)
        d *= scale
        value = rstd * (d - unit * (tl.sum(d * unit, 1) / WIDTH)[:, None])
        if HAS_DX:
            there = rows[:, None] * dx_stride + columns[None, :]
            value += tl.load(dx + there, mask=kept[:, None], other=0.0).to(tl.float32)
        there = rows[:, None] * dx_out_stride + columns[None, :]
        tl.store(dx_out + there, value.to(dx_out.dtype.element_ty), mask=kept[:, None])
    if WEIGHT:
        tl.store(sums + tl.program_id(0) * sums_stride + columns, dweight)


def residual_norm(
    x_ND: Tensor, branch: Sum | None, weight_D: Tensor | None, normed_ND: Tensor | None
) -> tuple[Tensor, RootNormed | None]:
    """See `residual_norm.residual_norm`."""
    count, width = x_ND.shape
    added = Sum(x_ND) if branch is None else branch
    late = added.hidden_NR is not None
    hidden, weight = (added.hidden_NR, added.weight_RK) if late else (x_ND, x_ND)
    x_out = x_ND if branch is None else x_ND.new_empty(count, width)
    normed = RootNormed(x_ND, x_ND)
    if weight_D is not None:
        normed = RootNormed(normed_ND, x_ND.new_empty(count, dtype=torch.float32))
    _residual_norm[(triton.cdiv(count, LAUNCH["ROWS"]),)](
        x_ND, added.base_NK, hidden, weight, hidden.stride(0), weight.stride(0),
        x_ND if weight_D is None else weight_D, x_out, *normed,
        count, x_ND.stride(0), added.base_NK.stride(0), normed.normed_ND.stride(0), _EPS,
        WIDTH=width, RANK=hidden.shape[1] if late else 0, HAS_BRANCH=branch is not None, HAS_NORM=weight_D is not None,
        **LAUNCH,
    )  # fmt: skip
    return x_out, None if weight_D is None else normed


def residual_norm_backward(
    dx_ND: Tensor | None,
    dnormed_ND: Tensor,
    x_ND: Tensor,
    normed: RootNormed,
    weight_D: Tensor,
    dx_out_ND: Tensor,
    sums_PD: Tensor | None,
) -> None:
    """See `residual_norm.residual_norm_backward`."""
    count, width = x_ND.shape
    dx = dnormed_ND if dx_ND is None else dx_ND
    sums = dnormed_ND if sums_PD is None else sums_PD
    launch = {name: value for name, value in BACKWARD_LAUNCH.items() if name != "PROGRAMS"}
    _residual_norm_backward[(backward_programs(count),)](
        dx, dnormed_ND, x_ND, normed.rstd_N, weight_D, dx_out_ND, sums,
        count, x_ND.stride(0), dx.stride(0), dx_out_ND.stride(0), sums.stride(0),
        WIDTH=width, HAS_DX=dx_ND is not None, WEIGHT=sums_PD is not None, **launch,
    )  # fmt: skip


def backward_programs(count: int) -> int:
    """How many partial sums `residual_norm_backward` leaves."""
    return min(BACKWARD_LAUNCH["PROGRAMS"], triton.cdiv(count, BACKWARD_LAUNCH["ROWS"]))
