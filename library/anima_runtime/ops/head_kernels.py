"""Triton kernels of `block_ops.head_norms` and its gradients, which says what they compute. Imported on CUDA only.

A program works on whole rows, all heads of each. A launch's second axis is the tensor: q, k, or v, whose gradient is
only copied. Sums over rows, the gradients of the weights, are left as one partial sum a program.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from library.anima_runtime.attention import RotaryTables

_EPS = 1e-6
# Numbers a program takes at a time, its warps, and a tensor's programs where they take rows again and again; measured
# on an H200 (docs/performance.md) at 1024, 4096 and 16384 rows of 2048.
LAUNCH = {"SIZE": 4096, "PROGRAMS": 528, "num_warps": 4}


@triton.jit
def _places(first, count, width_stride, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Where the first halves of the heads of some rows lie, and which of the rows are there."""
    rows = first + tl.arange(0, ROWS)
    inside = tl.arange(0, HEADS)[None, :, None] * (2 * HALF) + tl.arange(0, HALF)[None, None, :]
    return rows.to(tl.int64)[:, None, None] * width_stride + inside, (rows < count)[:, None, None]


@triton.jit
def _angles(table, first, length, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Of these rows' positions, once a head: so they come in the layout in which they are used."""
    positions = (first + tl.arange(0, ROWS)) % length
    here = positions[:, None, None] * HALF + tl.arange(0, HALF)[None, None, :]
    return tl.load(table + tl.broadcast_to(here, (ROWS, HEADS, HALF)))


@triton.jit
def _halves(pointer, here, kept, HALF: tl.constexpr):
    a = tl.load(pointer + here, mask=kept, other=0.0).to(tl.float32)
    b = tl.load(pointer + here + HALF, mask=kept, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _put_halves(pointer, here, kept, a, b, HALF: tl.constexpr):
    tl.store(pointer + here, a.to(pointer.dtype.element_ty), mask=kept)
    tl.store(pointer + here + HALF, b.to(pointer.dtype.element_ty), mask=kept)


@triton.jit
def _norm(
    x, weight, cos, sin, out, count, length, x_stride, eps,
    HAS_ROTARY: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    here, kept = _places(first, count, x_stride, ROWS, HEADS, HALF)
    a, b = _halves(x, here, kept, HALF)
    rstd = tl.rsqrt(tl.sum(a * a + b * b, 2) / (2 * HALF) + eps)[:, :, None]
    half = tl.arange(0, HALF)
    a *= rstd * tl.load(weight + half)[None, None, :]
    b *= rstd * tl.load(weight + HALF + half)[None, None, :]
    if HAS_ROTARY:
        c = _angles(cos, first, length, ROWS, HEADS, HALF)
        s = _angles(sin, first, length, ROWS, HEADS, HALF)
        turned = a * c - b * s
        b = b * c + a * s
        a = turned
    there, kept = _places(first, count, 2 * HALF * HEADS, ROWS, HEADS, HALF)
    _put_halves(out, there, kept, a, b, HALF)


@triton.jit
def _head_norms(
    x_0, x_1, weight_0, weight_1, cos, sin, out_0, out_1, count, length, x_stride, eps,
    HAS_ROTARY: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _norm(x_0, weight_0, cos, sin, out_0, count, length, x_stride, eps, HAS_ROTARY, ROWS, HEADS, HALF)
    else:
        _norm(x_1, weight_1, cos, sin, out_1, count, length, x_stride, eps, HAS_ROTARY, ROWS, HEADS, HALF)


@triton.jit
def _norm_backward(
    dout, x, weight, cos, sin, dx, sums, count, length, x_stride, dx_stride, eps,
    HAS_ROTARY: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    half = tl.arange(0, HALF)
    norm_a = tl.load(weight + half)[None, None, :]
    norm_b = tl.load(weight + HALF + half)[None, None, :]
    sum_a = tl.zeros((ROWS, HEADS, HALF), tl.float32)
    sum_b = tl.zeros((ROWS, HEADS, HALF), tl.float32)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        here, kept = _places(first, count, x_stride, ROWS, HEADS, HALF)
        a, b = _halves(x, here, kept, HALF)
        there, kept = _places(first, count, 2 * HALF * HEADS, ROWS, HEADS, HALF)
        da, db = _halves(dout, there, kept, HALF)
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 2) / (2 * HALF) + eps)[:, :, None]
        a *= rstd
        b *= rstd
        if HAS_ROTARY:
            c = _angles(cos, first, length, ROWS, HEADS, HALF)
            s = _angles(sin, first, length, ROWS, HEADS, HALF)
            turned = da * c + db * s
            db = db * c - da * s
            da = turned
        if WEIGHT:
            sum_a += da * a
            sum_b += db * b
        da *= norm_a
        db *= norm_b
        along = (tl.sum(da * a + db * b, 2) / (2 * HALF))[:, :, None]
        back, kept = _places(first, count, dx_stride, ROWS, HEADS, HALF)
        _put_halves(dx, back, kept, rstd * (da - a * along), rstd * (db - b * along), HALF)
    if WEIGHT:
        own = sums + tl.program_id(0) * 2 * HALF
        tl.store(own + half, tl.sum(tl.reshape(sum_a, (ROWS * HEADS, HALF)), 0))
        tl.store(own + HALF + half, tl.sum(tl.reshape(sum_b, (ROWS * HEADS, HALF)), 0))


@triton.jit
def _copy(source, place, count, place_stride, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        here, kept = _places(first, count, 2 * HALF * HEADS, ROWS, HEADS, HALF)
        a, b = _halves(source, here, kept, HALF)
        there, kept = _places(first, count, place_stride, ROWS, HEADS, HALF)
        _put_halves(place, there, kept, a, b, HALF)


@triton.jit
def _head_norms_backward(
    dout_0, dout_1, dout_2, x_0, x_1, weight_0, weight_1, cos, sin, dx_0, dx_1, dx_2, sums,
    count, length, x_stride, dx_stride, eps, NORMS: tl.constexpr,
    HAS_ROTARY: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _norm_backward(dout_0, x_0, weight_0, cos, sin, dx_0, sums, count, length, x_stride, dx_stride, eps,
                       HAS_ROTARY, WEIGHT, ROWS, HEADS, HALF)  # fmt: skip
    elif tl.program_id(1) < NORMS:
        sums_1 = sums + tl.num_programs(0) * 2 * HALF
        _norm_backward(dout_1, x_1, weight_1, cos, sin, dx_1, sums_1, count, length, x_stride, dx_stride, eps,
                       HAS_ROTARY, WEIGHT, ROWS, HEADS, HALF)  # fmt: skip
    else:
        _copy(dout_2, dx_2, count, dx_stride, ROWS, HEADS, HALF)


def head_norms(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], rotary: RotaryTables | None, length: int
) -> list[Tensor]:
    """See `block_ops.head_norms`."""
    x_NE = inputs[0]
    count, width = x_NE.shape
    outputs = [x_NE.new_empty(count, width) for _ in inputs]
    shape = _shape(width, len(weights[0]))
    _head_norms[(triton.cdiv(count, shape["ROWS"]), len(inputs))](
        x_NE, inputs[-1], weights[0], weights[-1], *(rotary or (x_NE, x_NE)), outputs[0], outputs[-1],
        count, length, x_NE.stride(0), _EPS, HAS_ROTARY=rotary is not None, **shape,
    )  # fmt: skip
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
    """See `block_ops.head_norms_backward`."""
    x_NE, last = inputs[0], len(inputs) - 1
    count, width = x_NE.shape
    gradients = [gradient.contiguous() for gradient in gradients]
    programs = head_programs(count, width) if sums_MPD is None else sums_MPD.shape[1]
    _head_norms_backward[(programs, len(gradients))](
        gradients[0], gradients[last], gradients[-1], x_NE, inputs[-1], weights[0], weights[-1],
        *(rotary or (x_NE, x_NE)), into[0], into[last], into[-1], x_NE if sums_MPD is None else sums_MPD,
        count, length, x_NE.stride(0), into[0].stride(0), _EPS, NORMS=len(inputs), HAS_ROTARY=rotary is not None,
        WEIGHT=sums_MPD is not None, **_shape(width, len(weights[0])),
    )  # fmt: skip


def head_programs(count: int, width: int) -> int:
    """How many partial sums `head_norms_backward` leaves for each weight; adding them up costs more than a turn."""
    return min(LAUNCH["PROGRAMS"], triton.cdiv(count, 2 * _rows(width)))


def _rows(width: int) -> int:
    return max(1, LAUNCH["SIZE"] // width)


def _shape(width: int, head_size: int) -> dict[str, int]:
    return {
        "ROWS": _rows(width), "HEADS": width // head_size, "HALF": head_size // 2, "num_warps": LAUNCH["num_warps"],
    }  # fmt: skip
