"""Triton kernels of `mixing`, whose functions say what each computes. Imported on CUDA only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from library.anima_runtime.ops.block_kernels import sum_programs
from library.anima_runtime.ops.mixing import CHANCE

# A tile's rows and columns; PROGRAMS of a launch, each of which takes tiles again and again. Measured on an H200, where
# groups of more rows than matrix units need were no faster.
MERGE_LAUNCH = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
MIX_LAUNCH = {"COLUMNS": 128, "PROGRAMS": 264, "num_warps": 4, "num_stages": 4}
# Matrix units take 16 rows and more, small matrices have 8: rows are multiplied by 1 ⊗ v, several at once.
_LEAST_SIDE, _MOST_SIDE = 16, 128


@triton.jit
def _merge(
    weight, w1, w2, out, height, OUT: tl.constexpr, IN: tl.constexpr, J: tl.constexpr, K: tl.constexpr,
    CHANCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = IN * K // COLUMNS
    first = tl.program_id(0) % chunks * COLUMNS
    rows = (tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS))[:, None]
    columns = first + tl.arange(0, COLUMNS)[None, :]
    kept = rows < height
    small = tl.load(w1 + rows // J * IN + first // K, mask=kept, other=0.0).to(tl.float32)
    large_row = rows // (OUT * J) * J + rows % J
    large = tl.load(w2 + large_row * K + columns % K, mask=kept, other=0.0).to(tl.float32)
    here = rows.to(tl.int64) * (IN * K) + columns
    total = tl.load(weight + here, mask=kept, other=0.0).to(tl.float32) + small * large
    if out.dtype.element_ty == tl.bfloat16:
        bits = total.to(tl.uint32, bitcast=True) + ((here.to(tl.uint32) * CHANCE) >> 16)
        total = tl.where(total == total, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), total)
    tl.store(out + here, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _places(group, count, row_stride, part_stride, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """Where the parts of a group of rows lie, [GROUP * PARTS, 1], and which of them there are."""
    parts = tl.arange(0, GROUP * PARTS)
    rows = group * GROUP + parts // PARTS
    return (rows.to(tl.int64) * row_stride + parts % PARTS * part_stride)[:, None], (rows < count)[:, None]


@triton.jit
def _mix(
    v, a, b, mixed, partial, count, v_member, v_p, v_q, a_member, a_row, a_part, b_member, b_row, b_part,
    mixed_member, mixed_row, mixed_part,
    WIDTH: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    p, q = tl.arange(0, GROUP * P)[:, None], tl.arange(0, GROUP * Q)[None, :]
    own = p // P == q // Q
    whole = tl.load(v + member * v_member + p % P * v_p + q % Q * v_q, mask=own, other=0.0)
    total = tl.zeros((GROUP * P, GROUP * Q), tl.float32)
    chunks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    for number in range(tl.program_id(0), tl.cdiv(count, GROUP) * chunks, tl.num_programs(0)):
        group, columns = number // chunks, (number % chunks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        rows, kept = _places(group, count, a_row, a_part, P, GROUP)
        left = tl.load(a + member * a_member + rows + columns, mask=kept & (columns < WIDTH), other=0.0)
        rows, kept = _places(group, count, b_row, b_part, Q, GROUP)
        right = tl.load(b + member * b_member + rows + columns, mask=kept & (columns < WIDTH), other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
        value = tl.dot(whole, right, input_precision="ieee").to(mixed.dtype.element_ty)
        rows, kept = _places(group, count, mixed_row, mixed_part, P, GROUP)
        tl.store(mixed + member * mixed_member + rows + columns, value, mask=kept & (columns < WIDTH))
    # Only parts of one row belong together.
    total = tl.sum(tl.sum(tl.reshape(tl.where(own, total, 0.0), (GROUP, P, GROUP, Q)), 2), 0)
    here = tl.arange(0, P)[:, None] * v_p + tl.arange(0, Q)[None, :] * v_q
    tl.store(partial + (member * tl.num_programs(0) + tl.program_id(0)) * P * Q + here, total)


def merge(weight: Tensor, w1_MOI: Tensor, w2_MJK: Tensor, out: Tensor) -> None:
    """See `mixing.merge`."""
    (height, width), (_, o, i), (_, j, k) = weight.shape, w1_MOI.shape, w2_MJK.shape
    launch = MERGE_LAUNCH | {"COLUMNS": min(MERGE_LAUNCH["COLUMNS"], k & -k)}  # a power of two that divides k
    tiles = triton.cdiv(height, launch["ROWS"]) * (width // launch["COLUMNS"])
    _merge[(tiles,)](weight, w1_MOI, w2_MJK, out, height, OUT=o, IN=i, J=j, K=k, CHANCE=CHANCE, **launch)


def mixes(v_MPQ: Tensor) -> bool:
    """Whether the kernels can take these matrices: of powers of two, neither large nor thin."""
    sides = v_MPQ.shape[1:]
    return all(side.bit_count() == 1 for side in sides) and _group(*sides) * max(sides) <= _MOST_SIDE


def mix(v_MPQ: Tensor, a_MNPJ: Tensor, b_MNQJ: Tensor, mixed_MNPJ: Tensor) -> Tensor:
    """See `mixing.mix`. v has no gaps, and what is returned lies in memory as it does."""
    (members, p, q), (_, count, _, width) = v_MPQ.shape, b_MNQJ.shape
    group, columns = _group(p, q), max(16, min(MIX_LAUNCH["COLUMNS"], triton.next_power_of_2(width)))
    tiles = triton.cdiv(count, group) * triton.cdiv(width, columns)
    programs = min(max(1, MIX_LAUNCH["PROGRAMS"] // members), tiles)
    partial = v_MPQ.new_empty(members, programs, p * q, dtype=torch.float32)
    _mix[(programs, members)](
        v_MPQ, a_MNPJ, b_MNQJ, mixed_MNPJ, partial, count,
        *v_MPQ.stride(), *a_MNPJ.stride()[:3], *b_MNQJ.stride()[:3], *mixed_MNPJ.stride()[:3],
        WIDTH=width, P=p, Q=q, GROUP=group, COLUMNS=columns,
        num_warps=MIX_LAUNCH["num_warps"], num_stages=MIX_LAUNCH["num_stages"],
    )  # fmt: skip
    return sum_programs(partial).as_strided(v_MPQ.shape, (p * q, *v_MPQ.stride()[1:]))


def _group(p: int, q: int) -> int:
    """How many rows make 1 ⊗ v large enough."""
    return max(1, _LEAST_SIDE // min(p, q))
