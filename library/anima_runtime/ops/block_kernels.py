"""Triton kernels of `block_ops`, whose functions say what each computes. Imported on CUDA only.

Sums over rows are left as one partial sum a program by the kernels of norms and of heads, and added here in a fixed
order, so that two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows or columns a program takes at a time, and its warps; measured on an H200 (docs/performance.md).
ZERO_KEYS_LAUNCH = {"ROWS": 32, "num_warps": 4}
GELU_LAUNCH = {"SIZE": 2048, "num_warps": 4}
SUM_LAUNCH = {"ROWS": 64, "COLUMNS": 16, "num_warps": 4}
_COPY_SIZE = 2048


@triton.jit
def _sum_programs(partial, out, programs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = partial + tl.program_id(1).to(tl.int64) * programs * width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        kept = (rows < programs)[:, None] & (columns < width)[None, :]
        total += tl.load(start + rows[:, None] * width + columns[None, :], mask=kept, other=0.0)
    tl.store(out + tl.program_id(1) * width + columns, tl.sum(total, 0), mask=columns < width)


@triton.jit
def _normal(u):
    """(the standard normal distribution up to u, its density at u, times sqrt(2 pi)).

    Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26; its error of 7.5e-8 is far below bf16's
    rounding, and one exponential serves both.
    """
    density = tl.exp2(u * u * -0.7213475204444817)
    below = 1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(u)
    t = tl.rsqrt(below * below)  # 1 / below in fewer instructions than a division
    series = 0.5 * 1.061405429
    series = series * t - 0.5 * 1.453152027
    series = series * t + 0.5 * 1.421413741
    series = series * t - 0.5 * 0.284496736
    series = series * t + 0.5 * 0.254829592
    above = series * t * density
    return tl.where(u > 0, 1.0 - above, above), density


@triton.jit
def _row_and_columns(width, SIZE: tl.constexpr):
    """Of a program that takes SIZE columns of a row; all are numbered in one, as a grid's other axes end at 65535."""
    programs = tl.cdiv(width, SIZE)
    number = tl.program_id(0)
    return (number // programs).to(tl.int64), number % programs * SIZE + tl.arange(0, SIZE)


@triton.jit
def _gelu(x, out, width, out_stride, SIZE: tl.constexpr):
    row, columns = _row_and_columns(width, SIZE)
    u = tl.load(x + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    below, _ = _normal(u)
    tl.store(out + row * out_stride + columns, (u * below).to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _gelu_backward(dout, x, dx, width, dx_stride, SIZE: tl.constexpr):
    row, columns = _row_and_columns(width, SIZE)
    d = tl.load(dout + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    u = tl.load(x + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    below, density = _normal(u)
    d *= below + u * density * 0.3989422804014327
    tl.store(dx + row * dx_stride + columns, d.to(dx.dtype.element_ty), mask=columns < width)


@triton.jit
def _add_zero_keys(
    out, lse, total_lse, count, rows, length, heads, out_row_stride, lse_sample_stride, lse_head_stride, lse_row_stride,
    SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of a row's head, head after head
    kept = number < rows * heads
    row, head = number // heads, number % heads
    place = row // length * lse_sample_stride + head * lse_head_stride + row % length * lse_row_stride
    before = tl.load(lse + place, mask=kept, other=0.0)
    most = tl.maximum(before, 0.0)  # neither exponential overflows
    own = tl.exp(before - most)
    total = own + count * tl.exp(-most)
    columns = tl.arange(0, SIZE)
    here = row.to(tl.int64)[:, None] * out_row_stride + head[:, None] * SIZE + columns[None, :]
    value = tl.load(out + here, mask=kept[:, None], other=0.0).to(tl.float32) * (own / total)[:, None]
    tl.store(out + here, value.to(out.dtype.element_ty), mask=kept[:, None])
    tl.store(total_lse + place, most + tl.log(total), mask=kept)


@triton.jit
def _copy_all(sources, places, widths, row_strides, column_strides, sizes, factors, places_like, SIZE: tl.constexpr):
    number = tl.program_id(0)
    size = tl.load(sizes + number)
    first = tl.program_id(1) * SIZE
    if first < size:
        width = tl.load(widths + number)
        source = tl.load(sources + number).to(tl.pointer_type(tl.float32))
        place = tl.load(places + number).to(tl.pointer_type(places_like.dtype.element_ty))
        here = first + tl.arange(0, SIZE)
        value = tl.load(source + here, mask=here < size, other=0.0) * tl.load(factors + number)
        there = here // width * tl.load(row_strides + number) + here % width * tl.load(column_strides + number)
        tl.store(place + there, value.to(places_like.dtype.element_ty), mask=here < size)


class CopyPlan(NamedTuple):
    """Addresses of the sources when the tables were made, and the tables."""

    addresses: tuple[int, ...]
    tables: tuple[Tensor, ...]
    programs: int


def copy_all(copies: Sequence[tuple[Tensor, Tensor, float]], plan: CopyPlan | None) -> CopyPlan:
    """See `block_ops.ManyCopies`. Sources are contiguous float32. Returns the plan for the next time."""
    addresses = tuple(source.data_ptr() for source, _, _ in copies)
    if plan is None or plan.addresses != addresses:
        sources, places, factors = zip(*copies, strict=True)
        device = places[0].device
        # Widths and sizes of 32 bits, as dividing numbers of 64 takes longer than copying.
        columns = (
            (addresses, torch.int64),
            ([place.data_ptr() for place in places], torch.int64),
            ([source.shape[1] for source in sources], torch.int32),
            ([place.stride(0) for place in places], torch.int64),
            ([place.stride(1) for place in places], torch.int64),
            ([source.numel() for source in sources], torch.int32),
            (factors, torch.float32),
        )
        tables = tuple(torch.tensor(column, dtype=dtype, device=device) for column, dtype in columns)
        plan = CopyPlan(addresses, tables, triton.cdiv(max(source.numel() for source in sources), _COPY_SIZE))
    _copy_all[(len(copies), plan.programs)](*plan.tables, copies[0][1], SIZE=_COPY_SIZE, num_warps=4)
    return plan


def sum_programs(partial_BPK: Tensor) -> Tensor:
    """The sum over P, in a fixed order: [B, K]."""
    samples, programs, width = partial_BPK.shape
    out = partial_BPK.new_empty(samples, width)
    grid = (triton.cdiv(width, SUM_LAUNCH["COLUMNS"]), samples)
    _sum_programs[grid](partial_BPK, out, programs, width, **SUM_LAUNCH)
    return out


def gelu(x_NE: Tensor, out_NE: Tensor) -> None:
    """See `block_ops.gelu`."""
    count, width = x_NE.shape
    grid = (count * triton.cdiv(width, GELU_LAUNCH["SIZE"]),)
    _gelu[grid](x_NE, out_NE, width, out_NE.stride(0), **GELU_LAUNCH)


def gelu_backward(dout_NE: Tensor, x_NE: Tensor, dx_NE: Tensor) -> None:
    """See `block_ops.gelu_backward`."""
    count, width = x_NE.shape
    grid = (count * triton.cdiv(width, GELU_LAUNCH["SIZE"]),)
    _gelu_backward[grid](dout_NE, x_NE, dx_NE, width, dx_NE.stride(0), **GELU_LAUNCH)


def add_zero_keys(out_BLHD: Tensor, lse_BHL: Tensor, count: int) -> Tensor:
    """See `block_ops.add_zero_keys`. Heads of a row, and rows, follow each other in out."""
    samples, length, heads, size = out_BLHD.shape
    grid = (triton.cdiv(samples * length * heads, ZERO_KEYS_LAUNCH["ROWS"]),)
    # Not in place: several warps read a row's logarithm, and one of them would write it before others have read.
    total = torch.empty_strided(lse_BHL.shape, lse_BHL.stride(), dtype=lse_BHL.dtype, device=lse_BHL.device)
    _add_zero_keys[grid](
        out_BLHD, lse_BHL, total, float(count), samples * length, length, heads, out_BLHD.stride(1), *lse_BHL.stride(),
        SIZE=size, **ZERO_KEYS_LAUNCH,
    )  # fmt: skip
    return total
