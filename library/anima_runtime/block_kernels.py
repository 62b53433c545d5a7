"""Triton kernels of `block_ops`, whose functions say what each computes. Imported on CUDA only.

A program works on some rows (tokens) of one sample. What is added late, `hidden @ weight` of a rank of a few dozen,
is multiplied in the kernel that needs the sum: the sum is never written, which would take two passes over memory.
Sums over rows (gradients of modulations and norm weights) are left as one partial sum a program, added afterwards in
a fixed order, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from library.anima_runtime.attention import RotaryTables
from library.anima_runtime.block_ops import Gated, Modulation, Normed, Sum

_EPS = 1e-6
# Rows a program, and columns it takes at a time.
_ROWS, _COLUMNS = 16, 256
_HEAD_ROWS = 32
_TILE_ROWS, _TILE_COLUMNS = 64, 128
# Ranks are multiplied so many at a time; a matrix unit takes 16 at least.
_LEAST_RANKS, _MOST_RANKS = 16, 64


@triton.jit
def _late(hidden, weight, rows, kept, columns, hidden_stride, rank_stride, column_stride, RANK: tl.constexpr,
          RANKS: tl.constexpr):  # fmt: skip
    """hidden [rows, RANK] @ weight [RANK, columns], RANKS at a time: float32."""
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in tl.static_range(0, RANK, RANKS):
        ranks = first + tl.arange(0, RANKS)
        a = tl.load(hidden + rows[:, None] * hidden_stride + ranks[None, :], mask=kept[:, None], other=0.0)
        b = tl.load(weight + ranks[:, None] * rank_stride + columns[None, :] * column_stride)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _gated_norm(
    x, base, hidden, weight, hidden_stride, rank_stride, column_stride, gate, shift, scale,
    x_out, normed, mean_out, rstd_out,
    length, base_stride, gate_stride, modulation_stride, eps,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = places < length
    rows = sample.to(tl.int64) * length + places
    total = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        here = rows[:, None] * WIDTH + columns[None, :]
        value = tl.load(x + here, mask=kept[:, None], other=0.0).to(tl.float32)
        if HAS_BRANCH:
            branch = tl.load(base + rows[:, None] * base_stride + columns[None, :], mask=kept[:, None], other=0.0)
            branch = branch.to(tl.float32)
            if RANK > 0:
                branch += _late(hidden, weight, rows, kept, columns, hidden_stride, rank_stride, column_stride, RANK,
                                RANKS)  # fmt: skip
            value += tl.load(gate + sample * gate_stride + columns).to(tl.float32)[None, :] * branch
            rounded = value.to(x_out.dtype.element_ty)
            tl.store(x_out + here, rounded, mask=kept[:, None])
            value = rounded.to(tl.float32)
        total += tl.sum(value, 1)
        squares += tl.sum(value * value, 1)
    if HAS_NORM:
        mean = total / WIDTH
        rstd = tl.rsqrt(tl.maximum(squares / WIDTH - mean * mean, 0.0) + eps)
        tl.store(mean_out + rows, mean, mask=kept)
        tl.store(rstd_out + rows, rstd, mask=kept)
        tl.debug_barrier()  # what this program's other threads have written is read below
        for first in range(0, WIDTH, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            here = rows[:, None] * WIDTH + columns[None, :]
            if HAS_BRANCH:
                value = tl.load(x_out + here, mask=kept[:, None], other=0.0).to(tl.float32)
            else:
                value = tl.load(x + here, mask=kept[:, None], other=0.0).to(tl.float32)
            up = tl.load(scale + sample * modulation_stride + columns).to(tl.float32)
            add = tl.load(shift + sample * modulation_stride + columns).to(tl.float32)
            value = (value - mean[:, None]) * rstd[:, None] * (1.0 + up[None, :]) + add[None, :]
            tl.store(normed + here, value.to(normed.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _gated_norm_backward(
    dx, dnormed, dhidden, dweight, dhidden_stride, drank_stride, dcolumn_stride, x, mean_in, rstd_in, scale,
    base, hidden, weight, hidden_stride, rank_stride, column_stride, gate, dx_out, dbranch, partial,
    length, dnormed_stride, modulation_stride, base_stride, gate_stride,
    WIDTH: tl.constexpr, DRANK: tl.constexpr, DRANKS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_NORM: tl.constexpr, MODULATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = places < length
    rows = sample.to(tl.int64) * length + places
    program = (sample * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    if HAS_NORM:
        mean = tl.load(mean_in + rows, mask=kept, other=0.0)
        rstd = tl.load(rstd_in + rows, mask=kept, other=0.0)
        total = tl.zeros((ROWS,), tl.float32)
        along = tl.zeros((ROWS,), tl.float32)
        for first in range(0, WIDTH, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            here = rows[:, None] * WIDTH + columns[None, :]
            d = tl.load(dnormed + rows[:, None] * dnormed_stride + columns[None, :], mask=kept[:, None], other=0.0)
            d = d.to(tl.float32)
            if DRANK > 0:
                d += _late(dhidden, dweight, rows, kept, columns, dhidden_stride, drank_stride, dcolumn_stride, DRANK,
                           DRANKS)  # fmt: skip
            unit = tl.load(x + here, mask=kept[:, None], other=0.0).to(tl.float32)
            unit = (unit - mean[:, None]) * rstd[:, None]
            if MODULATION:
                tl.store(partial + program * 3 * WIDTH + columns, tl.sum(d, 0))
                tl.store(partial + (program * 3 + 1) * WIDTH + columns, tl.sum(d * unit, 0))
            d *= 1.0 + tl.load(scale + sample * modulation_stride + columns).to(tl.float32)[None, :]
            total += tl.sum(d, 1)
            along += tl.sum(d * unit, 1)
        total /= WIDTH
        along /= WIDTH
    for first in range(0, WIDTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        here = rows[:, None] * WIDTH + columns[None, :]
        value = tl.load(dx + here, mask=kept[:, None], other=0.0).to(tl.float32)
        if HAS_NORM:
            d = tl.load(dnormed + rows[:, None] * dnormed_stride + columns[None, :], mask=kept[:, None], other=0.0)
            d = d.to(tl.float32)
            if DRANK > 0:
                d += _late(dhidden, dweight, rows, kept, columns, dhidden_stride, drank_stride, dcolumn_stride, DRANK,
                           DRANKS)  # fmt: skip
            unit = tl.load(x + here, mask=kept[:, None], other=0.0).to(tl.float32)
            unit = (unit - mean[:, None]) * rstd[:, None]
            d *= 1.0 + tl.load(scale + sample * modulation_stride + columns).to(tl.float32)[None, :]
            value += rstd[:, None] * (d - total[:, None] - unit * along[:, None])
            tl.store(dx_out + here, value.to(dx_out.dtype.element_ty), mask=kept[:, None])
        if HAS_BRANCH:
            opening = tl.load(gate + sample * gate_stride + columns).to(tl.float32)
            tl.store(dbranch + here, (value * opening[None, :]).to(dbranch.dtype.element_ty), mask=kept[:, None])
            if MODULATION:
                branch = tl.load(base + rows[:, None] * base_stride + columns[None, :], mask=kept[:, None], other=0.0)
                branch = branch.to(tl.float32)
                if RANK > 0:
                    branch += _late(hidden, weight, rows, kept, columns, hidden_stride, rank_stride, column_stride,
                                    RANK, RANKS)  # fmt: skip
                tl.store(partial + (program * 3 + 2) * WIDTH + columns, tl.sum(value * branch, 0))


@triton.jit
def _load_half(base, hidden, weight, rows, kept, columns, base_stride, hidden_stride, rank_stride, column_stride,
               RANK: tl.constexpr, RANKS: tl.constexpr):  # fmt: skip
    value = tl.load(base + rows[:, None] * base_stride + columns[None, :], mask=kept[:, None], other=0.0)
    value = value.to(tl.float32)
    if RANK > 0:
        value += _late(hidden, weight, rows, kept, columns, hidden_stride, rank_stride, column_stride, RANK, RANKS)
    return value


@triton.jit
def _head_norm(
    base, hidden, weight, hidden_stride, rank_stride, column_stride, norm, cos, sin, out,
    count, length, base_stride, eps, WIDTH: tl.constexpr,
    HALF: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = places < count
    rows = places.to(tl.int64)
    half = tl.arange(0, HALF)
    first = tl.program_id(1) * 2 * HALF + half
    a = _load_half(base, hidden, weight, rows, kept, first, base_stride, hidden_stride, rank_stride, column_stride,
                   RANK, RANKS)  # fmt: skip
    b = _load_half(base, hidden, weight, rows, kept, first + HALF, base_stride, hidden_stride, rank_stride,
                   column_stride, RANK, RANKS)  # fmt: skip
    if HAS_NORM:
        rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
        a *= rstd[:, None] * tl.load(norm + half)[None, :]
        b *= rstd[:, None] * tl.load(norm + HALF + half)[None, :]
    if HAS_ROTARY:
        angle = (places % length)[:, None] * HALF + half[None, :]
        c = tl.load(cos + angle)
        s = tl.load(sin + angle)
        turned = a * c - b * s
        b = b * c + a * s
        a = turned
    tl.store(out + rows[:, None] * WIDTH + first[None, :], a.to(out.dtype.element_ty), mask=kept[:, None])
    tl.store(out + rows[:, None] * WIDTH + first[None, :] + HALF, b.to(out.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _head_norm_backward(
    dout, base, hidden, weight, hidden_stride, rank_stride, column_stride, norm, cos, sin, dbase, partial,
    count, length, dout_stride, base_stride, dbase_stride, eps,
    HALF: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, HAS_ROTARY: tl.constexpr, WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = places < count
    rows = places.to(tl.int64)
    half = tl.arange(0, HALF)
    first = tl.program_id(1) * 2 * HALF + half
    a = _load_half(base, hidden, weight, rows, kept, first, base_stride, hidden_stride, rank_stride, column_stride,
                   RANK, RANKS)  # fmt: skip
    b = _load_half(base, hidden, weight, rows, kept, first + HALF, base_stride, hidden_stride, rank_stride,
                   column_stride, RANK, RANKS)  # fmt: skip
    rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
    a *= rstd[:, None]
    b *= rstd[:, None]
    here = rows[:, None] * dout_stride + first[None, :]
    da = tl.load(dout + here, mask=kept[:, None], other=0.0).to(tl.float32)
    db = tl.load(dout + here + HALF, mask=kept[:, None], other=0.0).to(tl.float32)
    if HAS_ROTARY:
        angle = (places % length)[:, None] * HALF + half[None, :]
        c = tl.load(cos + angle)
        s = tl.load(sin + angle)
        turned = da * c + db * s
        db = db * c - da * s
        da = turned
    if WEIGHT:
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        tl.store(partial + program * 2 * HALF + half, tl.sum(da * a, 0))
        tl.store(partial + program * 2 * HALF + HALF + half, tl.sum(db * b, 0))
    da *= tl.load(norm + half)[None, :]
    db *= tl.load(norm + HALF + half)[None, :]
    along = (tl.sum(da * a, 1) + tl.sum(db * b, 1)) / (2 * HALF)
    da = rstd[:, None] * (da - a * along[:, None])
    db = rstd[:, None] * (db - b * along[:, None])
    there = rows[:, None] * dbase_stride + first[None, :]
    tl.store(dbase + there, da.to(dbase.dtype.element_ty), mask=kept[:, None])
    tl.store(dbase + there + HALF, db.to(dbase.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _activate(
    base, hidden, weight, hidden_stride, rank_stride, column_stride, out, count, width, base_stride,
    RANK: tl.constexpr, RANKS: tl.constexpr, HAS_GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept = rows < count
    u = _load_half(base, hidden, weight, rows, kept, columns, base_stride, hidden_stride, rank_stride, column_stride,
                   RANK, RANKS)  # fmt: skip
    if HAS_GELU:
        u = 0.5 * u * (1.0 + tl.math.erf(u * 0.7071067811865476))
    tl.store(out + rows[:, None] * width + columns[None, :], u.to(out.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _gelu_backward(
    dout, dhidden, dweight, dhidden_stride, drank_stride, dcolumn_stride,
    base, hidden, weight, hidden_stride, rank_stride, column_stride, dbase, count, width, dout_stride, base_stride,
    DRANK: tl.constexpr, DRANKS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kept = rows < count
    d = _load_half(dout, dhidden, dweight, rows, kept, columns, dout_stride, dhidden_stride, drank_stride,
                   dcolumn_stride, DRANK, DRANKS)  # fmt: skip
    u = _load_half(base, hidden, weight, rows, kept, columns, base_stride, hidden_stride, rank_stride, column_stride,
                   RANK, RANKS)  # fmt: skip
    slope = 0.5 * (1.0 + tl.math.erf(u * 0.7071067811865476)) + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    here = rows[:, None] * width + columns[None, :]
    tl.store(dbase + here, (d * slope).to(dbase.dtype.element_ty), mask=kept[:, None])


def _late_arguments(x: Sum) -> tuple[Tensor, Tensor, int, int, int, int]:
    """Pointers and strides (of hidden's rows, weight's rows and columns) of what is added late, or stand-ins."""
    if x.hidden_NR is None:
        return x.base_NK, x.base_NK, 0, 0, 0
    return x.hidden_NR, x.weight_RK, x.hidden_NR.stride(0), *x.weight_RK.stride()


def _ranks(x: Sum) -> tuple[int, int]:
    """The rank of what is added late, and how many of it are multiplied at a time."""
    rank = 0 if x.hidden_NR is None else x.hidden_NR.shape[1]
    return rank, max(_LEAST_RANKS, min(_MOST_RANKS, rank & -rank))


def gated_norm(x_BLD: Tensor, gated: Gated | None, modulation: Modulation | None) -> tuple[Tensor, Normed | None]:
    """See `block_ops.gated_norm`."""
    samples, length, width = x_BLD.shape
    branch, gate = gated or (Sum(x_BLD.flatten(0, 1)), x_BLD)
    shift, scale = modulation or (x_BLD, x_BLD)
    x_out = x_BLD if gated is None else torch.empty_like(x_BLD)
    normed = Normed(x_BLD, x_BLD, x_BLD)
    if modulation is not None:
        normed = Normed(torch.empty_like(x_BLD), *x_BLD.new_empty(2, samples * length, dtype=torch.float32))
    rank, ranks = _ranks(branch)
    _gated_norm[(triton.cdiv(length, _ROWS), samples)](
        x_BLD, branch.base_NK, *_late_arguments(branch), gate, shift, scale, x_out, *normed,
        length, branch.base_NK.stride(0), gate.stride(0), scale.stride(0), _EPS,
        WIDTH=width, RANK=rank, RANKS=ranks, HAS_BRANCH=gated is not None, HAS_NORM=modulation is not None,
        ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=8,
    )  # fmt: skip
    return x_out, None if modulation is None else normed


def gated_norm_backward(
    dx_BLD: Tensor,
    dnormed: Sum | None,
    x_BLD: Tensor,
    normed: Normed | None,
    modulation: Modulation | None,
    gated: Gated | None,
    wants_modulation: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `block_ops.gated_norm_backward`."""
    samples, length, width = dx_BLD.shape
    nothing = Sum(dx_BLD.flatten(0, 1))
    branch, gate = gated or (nothing, dx_BLD)
    d = dnormed or nothing
    mean, rstd = (dx_BLD, dx_BLD) if normed is None else (normed.mean_N, normed.rstd_N)
    scale = dx_BLD if modulation is None else modulation.scale_BD
    dx_out = dx_BLD if dnormed is None else torch.empty_like(dx_BLD)
    dbranch = dx_BLD if gated is None else dx_BLD.new_empty(samples * length, width)
    programs, partial = triton.cdiv(length, _ROWS), dx_BLD
    if wants_modulation:
        new = torch.zeros if dnormed is None or gated is None else torch.empty
        partial = new(samples, programs, 3, width, device=dx_BLD.device, dtype=torch.float32)
    (drank, dranks), (rank, ranks) = _ranks(d), _ranks(branch)
    _gated_norm_backward[(programs, samples)](
        dx_BLD, d.base_NK, *_late_arguments(d), x_BLD, mean, rstd, scale, branch.base_NK, *_late_arguments(branch),
        gate, dx_out, dbranch, partial,
        length, d.base_NK.stride(0), scale.stride(0), branch.base_NK.stride(0), gate.stride(0),
        WIDTH=width, DRANK=drank, DRANKS=dranks, RANK=rank, RANKS=ranks, HAS_BRANCH=gated is not None,
        HAS_NORM=dnormed is not None, MODULATION=wants_modulation, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=8,
    )  # fmt: skip
    return dx_out, None if gated is None else dbranch, partial.sum(1) if wants_modulation else None


def head_norm(x: Sum, weight_D: Tensor | None, rotary: RotaryTables | None, length: int, head_size: int) -> Tensor:
    """See `block_ops.head_norm`."""
    base = x.base_NK
    count, width = base.shape
    out = base.new_empty(count, width)
    rank, ranks = _ranks(x)
    _head_norm[(triton.cdiv(count, _HEAD_ROWS), width // head_size)](
        base, *_late_arguments(x), base if weight_D is None else weight_D, *(rotary or (base, base)), out,
        count, length, base.stride(0), _EPS, WIDTH=width, HALF=head_size // 2, RANK=rank, RANKS=ranks,
        HAS_NORM=weight_D is not None, HAS_ROTARY=rotary is not None, ROWS=_HEAD_ROWS, num_warps=4,
    )  # fmt: skip
    return out


def head_norm_backward(
    dout_NE: Tensor,
    x: Sum,
    weight_D: Tensor,
    rotary: RotaryTables | None,
    length: int,
    head_size: int,
    dx_NE: Tensor,
    wants_weight: bool,
) -> Tensor | None:
    """See `block_ops.head_norm_backward`."""
    base = x.base_NK
    count, width = base.shape
    grid, partial = (triton.cdiv(count, _HEAD_ROWS), width // head_size), base
    if wants_weight:
        partial = base.new_empty(grid[0] * grid[1], head_size, dtype=torch.float32)
    rank, ranks = _ranks(x)
    _head_norm_backward[grid](
        dout_NE, base, *_late_arguments(x), weight_D, *(rotary or (base, base)), dx_NE, partial,
        count, length, dout_NE.stride(0), base.stride(0), dx_NE.stride(0), _EPS,
        HALF=head_size // 2, RANK=rank, RANKS=ranks, HAS_ROTARY=rotary is not None, WEIGHT=wants_weight,
        ROWS=_HEAD_ROWS, num_warps=4,
    )  # fmt: skip
    return partial.sum(0) if wants_weight else None


def activate(x: Sum, has_gelu: bool) -> Tensor:
    """See `block_ops.gelu` and `block_ops.added`."""
    count, width = x.base_NK.shape
    out = x.base_NK.new_empty(count, width)
    rank, ranks = _ranks(x)
    _activate[(width // _TILE_COLUMNS, triton.cdiv(count, _TILE_ROWS))](
        x.base_NK, *_late_arguments(x), out, count, width, x.base_NK.stride(0),
        RANK=rank, RANKS=ranks, HAS_GELU=has_gelu, ROWS=_TILE_ROWS, COLUMNS=_TILE_COLUMNS, num_warps=8,
    )  # fmt: skip
    return out


def gelu_backward(dout: Sum, x: Sum) -> Tensor:
    """See `block_ops.gelu_backward`."""
    count, width = x.base_NK.shape
    out = x.base_NK.new_empty(count, width)
    (drank, dranks), (rank, ranks) = _ranks(dout), _ranks(x)
    _gelu_backward[(width // _TILE_COLUMNS, triton.cdiv(count, _TILE_ROWS))](
        dout.base_NK, *_late_arguments(dout), x.base_NK, *_late_arguments(x), out,
        count, width, dout.base_NK.stride(0), x.base_NK.stride(0),
        DRANK=drank, DRANKS=dranks, RANK=rank, RANKS=ranks,
        ROWS=_TILE_ROWS, COLUMNS=_TILE_COLUMNS, num_warps=8,
    )  # fmt: skip
    return out
