"""Triton kernels of `block_ops.gated_norm` and its gradients, which says what they compute. Imported on CUDA only.

A program works on some rows (tokens) of one sample. Sums over rows, the gradients of modulations, are left as one
partial sum a program, added afterwards in a fixed order, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from library.anima_runtime.ops.block_ops import Gated, Modulation, ModulationSums, Normed, Sum

_EPS = 1e-6
# Rows a program takes at a time, and its warps; measured on an H200 (docs/performance.md) at 1024, 4096 and 16384 rows
# of 2048. BRANCH_ROWS: of a residual without a norm, which has registers left to read a LoRA's weights less often.
LAUNCH = {"ROWS": 2, "BRANCH_ROWS": 4, "num_warps": 4}
# PROGRAMS of a launch, one a multiprocessor, each of which takes rows again and again and loads some turns ahead:
# STAGES. HALF_ROWS: of one half, norm or branch, alone. A LoRA's weights stay in registers, where rank 16 has room.
BACKWARD_LAUNCH = {"ROWS": 1, "HALF_ROWS": 2, "PROGRAMS": 132, "STAGES": 4, "num_warps": 8}


@triton.jit
def _load_sum(
    base, hidden, weight, rows, kept, columns, base_stride, hidden_stride, weight_stride, RANK: tl.constexpr,
):  # fmt: skip
    """base + hidden @ weight at these rows and columns: float32. Not by matrix units, which take 16 rows and more."""
    total = tl.load(base + rows[:, None] * base_stride + columns[None, :], mask=kept[:, None], other=0.0)
    total = total.to(tl.float32)
    for rank in tl.static_range(RANK):
        a = tl.load(hidden + rows * hidden_stride + rank, mask=kept, other=0.0).to(tl.float32)
        b = tl.load(weight + rank * weight_stride + columns).to(tl.float32)
        total += a[:, None] * b[None, :]
    return total


@triton.jit
def _gated_norm(
    x, base, hidden, weight, hidden_stride, weight_stride, gate, shift, scale,
    x_out, normed, mean_out, rstd_out, length, base_stride, normed_stride, gate_stride, modulation_stride, eps,
    WIDTH: tl.constexpr, RANK: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = places < length
    rows = sample.to(tl.int64) * length + places
    columns = tl.arange(0, WIDTH)
    here = rows[:, None] * WIDTH + columns[None, :]
    value = tl.load(x + here, mask=kept[:, None], other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = _load_sum(base, hidden, weight, rows, kept, columns, base_stride, hidden_stride, weight_stride, RANK)
        value += tl.load(gate + sample * gate_stride + columns).to(tl.float32)[None, :] * branch
        rounded = value.to(x_out.dtype.element_ty)
        tl.store(x_out + here, rounded, mask=kept[:, None])
        value = rounded.to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(value, 1) / WIDTH
        value -= mean[:, None]
        rstd = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
        tl.store(mean_out + rows, mean, mask=kept)
        tl.store(rstd_out + rows, rstd, mask=kept)
        up = 1.0 + tl.load(scale + sample * modulation_stride + columns).to(tl.float32)
        add = tl.load(shift + sample * modulation_stride + columns).to(tl.float32)
        value = value * rstd[:, None] * up[None, :] + add[None, :]
        there = rows[:, None] * normed_stride + columns[None, :]
        tl.store(normed + there, value.to(normed.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _gated_norm_backward(
    dx, dnormed, x, mean_in, rstd_in, scale,
    base, hidden, weight, hidden_stride, weight_stride, gate, dx_out, dbranch, partial,
    length, modulation_stride, base_stride, dbranch_stride, gate_stride, slots, norm_slot, gate_slot,
    WIDTH: tl.constexpr, RANK: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr,
    MODULATION: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    if HAS_NORM:
        up = 1.0 + tl.load(scale + sample * modulation_stride + columns).to(tl.float32)
    if HAS_BRANCH:
        opening = tl.load(gate + sample * gate_stride + columns).to(tl.float32)
    if RANK:
        ranks = tl.arange(0, RANK)
        late = tl.load(weight + ranks[:, None] * weight_stride + columns[None, :])
    dshift = tl.zeros((WIDTH,), tl.float32)
    dscale = tl.zeros((WIDTH,), tl.float32)
    dgate = tl.zeros((WIDTH,), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, length, tl.num_programs(0) * ROWS, num_stages=STAGES):
        places = first + tl.arange(0, ROWS)
        kept = places < length
        rows = sample.to(tl.int64) * length + places
        here = rows[:, None] * WIDTH + columns[None, :]
        # All loads come first, so that none waits for a store.
        value = tl.load(dx + here, mask=kept[:, None], other=0.0)
        if HAS_NORM:
            d = tl.load(dnormed + here, mask=kept[:, None], other=0.0)
            unit = tl.load(x + here, mask=kept[:, None], other=0.0)
            mean = tl.load(mean_in + rows, mask=kept, other=0.0)
            rstd = tl.load(rstd_in + rows, mask=kept, other=0.0)
        if HAS_BRANCH and MODULATION:
            branch = tl.load(base + rows[:, None] * base_stride + columns[None, :], mask=kept[:, None], other=0.0)
            if RANK:
                a = tl.load(hidden + rows[:, None] * hidden_stride + ranks[None, :], mask=kept[:, None], other=0.0)
        value = value.to(tl.float32)
        if HAS_NORM:
            unit = (unit.to(tl.float32) - mean[:, None]) * rstd[:, None]
            d = d.to(tl.float32)
            if MODULATION:
                dshift += tl.sum(d, 0)
                dscale += tl.sum(d * unit, 0)
            d *= up[None, :]
            across, along = tl.reduce((d, d * unit), 1, _add_pairs)
            value += rstd[:, None] * (d - (across / WIDTH)[:, None] - unit * (along / WIDTH)[:, None])
            tl.store(dx_out + here, value.to(dx_out.dtype.element_ty), mask=kept[:, None])
        if HAS_BRANCH:
            there = rows[:, None] * dbranch_stride + columns[None, :]
            tl.store(dbranch + there, (value * opening[None, :]).to(dbranch.dtype.element_ty), mask=kept[:, None])
            if MODULATION:
                branch = branch.to(tl.float32)
                if RANK:
                    branch += tl.sum(a.to(tl.float32)[:, :, None] * late.to(tl.float32)[None, :, :], 1)
                dgate += tl.sum(value * branch, 0)
    if MODULATION:
        sums = partial + (sample * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * slots * WIDTH
        if HAS_NORM:
            tl.store(sums + norm_slot * WIDTH + columns, dshift)
            tl.store(sums + (norm_slot + 1) * WIDTH + columns, dscale)
        if HAS_BRANCH:
            tl.store(sums + gate_slot * WIDTH + columns, dgate)


def gated_norm(
    x_BLD: Tensor, gated: Gated | None, modulation: Modulation | None, normed_ND: Tensor | None
) -> tuple[Tensor, Normed | None]:
    """See `block_ops.gated_norm`."""
    samples, length, width = x_BLD.shape
    branch, gate = gated or (Sum(x_BLD.flatten(0, 1)), x_BLD)
    shift, scale = modulation or (x_BLD, x_BLD)
    x_out = x_BLD if gated is None else torch.empty_like(x_BLD)
    normed = Normed(x_BLD, x_BLD, x_BLD)
    if modulation is not None:
        normed = Normed(normed_ND, *x_BLD.new_empty(2, samples * length, dtype=torch.float32))
    rows = LAUNCH["BRANCH_ROWS" if modulation is None else "ROWS"]
    _gated_norm[(triton.cdiv(length, rows), samples)](
        x_BLD, branch.base_NK, *_late_arguments(branch), gate, shift, scale, x_out, *normed,
        length, branch.base_NK.stride(0), normed.normed_ND.stride(0), gate.stride(0), scale.stride(0), _EPS,
        WIDTH=width, RANK=_rank(branch), HAS_BRANCH=gated is not None, HAS_NORM=modulation is not None, ROWS=rows,
        num_warps=LAUNCH["num_warps"],
    )  # fmt: skip
    return x_out, None if modulation is None else normed


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
    """See `block_ops.gated_norm_backward`."""
    samples, length, width = dx_BLD.shape
    branch, gate = gated or (None, dx_BLD)
    if branch is None:
        branch = Sum(dx_BLD.flatten(0, 1))
    _, mean, rstd = normed or (dx_BLD, dx_BLD, dx_BLD)
    scale = dx_BLD if modulation is None else modulation.scale_BD
    dx_out = dx_BLD if dnormed_ND is None else torch.empty_like(dx_BLD)
    dbranch = dx_BLD if dbranch_ND is None else dbranch_ND
    partial, norm_slot, gate_slot = sums or (dx_BLD, 0, 0)
    is_half = gated is None or dnormed_ND is None
    _gated_norm_backward[(modulation_programs(samples, length), samples)](
        dx_BLD, dx_BLD if dnormed_ND is None else dnormed_ND, x_BLD, mean, rstd, scale,
        branch.base_NK, *_late_arguments(branch), gate, dx_out, dbranch, partial,
        length, scale.stride(0), branch.base_NK.stride(0), dbranch.stride(0), gate.stride(0),
        partial.shape[-2], norm_slot, gate_slot,
        WIDTH=width, RANK=0 if sums is None else _rank(branch), HAS_BRANCH=gated is not None,
        HAS_NORM=dnormed_ND is not None, MODULATION=sums is not None,
        ROWS=BACKWARD_LAUNCH["HALF_ROWS" if is_half else "ROWS"], num_warps=BACKWARD_LAUNCH["num_warps"],
        # What is loaded ahead takes shared memory: 72 KiB of 2048 columns in bf16.
        STAGES=BACKWARD_LAUNCH["STAGES"] if dx_BLD.element_size() == 2 else 1,
    )  # fmt: skip
    return dx_out


def modulation_programs(samples: int, length: int) -> int:
    """How many partial sums `gated_norm_backward` leaves for each sample."""
    return min(max(1, BACKWARD_LAUNCH["PROGRAMS"] // samples), length)


def _late_arguments(x: Sum) -> tuple[Tensor, Tensor, int, int]:
    """Pointers and row strides of what is added late, or stand-ins."""
    if x.hidden_NR is None:
        return x.base_NK, x.base_NK, 0, 0
    return x.hidden_NR, x.weight_RK, x.hidden_NR.stride(0), x.weight_RK.stride(0)


def _rank(x: Sum) -> int:
    return 0 if x.hidden_NR is None else x.hidden_NR.shape[1]
