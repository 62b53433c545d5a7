"""Triton kernels of `mixing`, whose functions say what each computes. Imported on CUDA only.

Matrix units take 16 rows and more, small matrices have 8: a program multiplies by 1 ⊗ w, for a group of rows at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from library.anima_runtime.block_kernels import sum_programs

# COLUMNS of a tile; PROGRAMS of a launch, each of which takes tiles again and again. Measured on an H200, where groups
# of more rows than matrix units need were no faster.
MIX_LAUNCH = {"COLUMNS": 256, "PROGRAMS": 4096, "num_warps": 4, "num_stages": 2}
BACKWARD_LAUNCH = {"COLUMNS": 128, "PROGRAMS": 528, "num_warps": 4, "num_stages": 3}
_LEAST_SIDE, _MOST_SIDE = 16, 128


@triton.jit
def _whole(w, OUT: tl.constexpr, IN: tl.constexpr, GROUP: tl.constexpr):
    """1 ⊗ w, [GROUP * OUT, GROUP * IN]."""
    rows, columns = tl.arange(0, GROUP * OUT)[:, None], tl.arange(0, GROUP * IN)[None, :]
    return tl.load(w + rows % OUT * IN + columns % IN, mask=rows // OUT == columns // IN, other=0.0)


@triton.jit
def _rows(group, count, token_stride, part_stride, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """Where the parts of a group of rows lie, [GROUP * PARTS, 1], and which of them there are."""
    parts = tl.arange(0, GROUP * PARTS)
    tokens = group * GROUP + parts // PARTS
    return (tokens.to(tl.int64) * token_stride + parts % PARTS * part_stride)[:, None], (tokens < count)[:, None]


@triton.jit
def _mix(
    w, x, out, count, x_member, x_token, x_part, out_member, out_token, out_part,
    WIDTH: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    whole = _whole(w + member * OUT * IN, OUT, IN, GROUP)
    chunks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    for number in range(tl.program_id(0), tl.cdiv(count, GROUP) * chunks, tl.num_programs(0)):
        columns = (number % chunks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        rows, kept = _rows(number // chunks, count, x_token, x_part, IN, GROUP)
        tile = tl.load(x + member * x_member + rows + columns, mask=kept & (columns < WIDTH), other=0.0)
        mixed = tl.dot(whole, tile, input_precision="ieee")
        rows, kept = _rows(number // chunks, count, out_token, out_part, OUT, GROUP)
        there = out + member * out_member + rows + columns
        tl.store(there, mixed.to(out.dtype.element_ty), mask=kept & (columns < WIDTH))


@triton.jit
def _mix_backward(
    w, dout, x, dx, again, partial, count, dout_member, dout_token, dout_part, x_member, x_token, x_part,
    dx_member, dx_token, dx_part, again_member, again_token, again_part,
    WIDTH: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, AGAIN: tl.constexpr, GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    whole = _whole(w + member * OUT * IN, OUT, IN, GROUP)
    total = tl.zeros((GROUP * OUT, GROUP * IN), tl.float32)
    chunks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    for number in range(tl.program_id(0), tl.cdiv(count, GROUP) * chunks, tl.num_programs(0)):
        group, columns = number // chunks, (number % chunks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        rows, kept = _rows(group, count, dout_token, dout_part, OUT, GROUP)
        d = tl.load(dout + member * dout_member + rows + columns, mask=kept & (columns < WIDTH), other=0.0)
        rows, kept = _rows(group, count, x_token, x_part, IN, GROUP)
        tile = tl.load(x + member * x_member + rows + columns, mask=kept & (columns < WIDTH), other=0.0)
        total = tl.dot(d, tl.trans(tile), total, input_precision="ieee")
        back = tl.dot(tl.trans(whole), d, input_precision="ieee")
        rows, kept = _rows(group, count, dx_token, dx_part, IN, GROUP)
        there = dx + member * dx_member + rows + columns
        tl.store(there, back.to(dx.dtype.element_ty), mask=kept & (columns < WIDTH))
        if AGAIN:
            mixed = tl.dot(whole, tile, input_precision="ieee")
            rows, kept = _rows(group, count, again_token, again_part, OUT, GROUP)
            there = again + member * again_member + rows + columns
            tl.store(there, mixed.to(again.dtype.element_ty), mask=kept & (columns < WIDTH))
    # Only parts of one row belong together.
    own = (tl.arange(0, GROUP * OUT) // OUT)[:, None] == (tl.arange(0, GROUP * IN) // IN)[None, :]
    total = tl.sum(tl.sum(tl.reshape(tl.where(own, total, 0.0), (GROUP, OUT, GROUP, IN)), 2), 0)
    here = tl.arange(0, OUT)[:, None] * IN + tl.arange(0, IN)[None, :]
    tl.store(partial + (member * tl.num_programs(0) + tl.program_id(0)) * OUT * IN + here, total)


def mixes(w_MOI: Tensor) -> bool:
    """Whether the kernels can take these matrices: of powers of two, neither large nor thin."""
    sides = w_MOI.shape[1:]
    return all(side.bit_count() == 1 for side in sides) and _group(*sides) * max(sides) <= _MOST_SIDE


def _group(o: int, i: int) -> int:
    """How many rows make 1 ⊗ w large enough."""
    return max(1, _LEAST_SIDE // min(o, i))


def mix(w_MOI: Tensor, x_MNIK: Tensor, out_MNOK: Tensor) -> None:
    """See `mixing.mix`."""
    sizes, programs, rest = _launch(MIX_LAUNCH, w_MOI, x_MNIK)
    _mix[(programs, len(w_MOI))](
        w_MOI.contiguous(), x_MNIK, out_MNOK, x_MNIK.shape[1], *x_MNIK.stride()[:3], *out_MNOK.stride()[:3],
        **sizes, **rest,
    )  # fmt: skip


def mix_backward(
    w_MOI: Tensor, dout_MNOK: Tensor, x_MNIK: Tensor, dx_MNIK: Tensor, again_MNOK: Tensor | None
) -> Tensor:
    """See `mixing.mix_backward`."""
    (members, o, i), again = w_MOI.shape, dout_MNOK if again_MNOK is None else again_MNOK
    sizes, programs, rest = _launch(BACKWARD_LAUNCH, w_MOI, x_MNIK)
    partial = w_MOI.new_empty(members, programs, o * i, dtype=torch.float32)
    _mix_backward[(programs, members)](
        w_MOI.contiguous(), dout_MNOK, x_MNIK, dx_MNIK, again, partial, x_MNIK.shape[1],
        *dout_MNOK.stride()[:3], *x_MNIK.stride()[:3], *dx_MNIK.stride()[:3], *again.stride()[:3],
        AGAIN=again_MNOK is not None, **sizes, **rest,
    )  # fmt: skip
    return sum_programs(partial).view(members, o, i)


def _launch(launch: dict[str, int], w_MOI: Tensor, x_MNIK: Tensor) -> tuple[dict[str, int], int, dict[str, int]]:
    """A kernel's sizes, its programs for each matrix, and what else it is launched with."""
    (members, o, i), (_, count, _, width) = w_MOI.shape, x_MNIK.shape
    group = _group(o, i)
    columns = min(launch["COLUMNS"], triton.next_power_of_2(width))
    tiles = triton.cdiv(count, group) * triton.cdiv(width, columns)
    programs = min(max(1, launch["PROGRAMS"] // members), tiles)
    sizes = {"WIDTH": width, "OUT": o, "IN": i, "GROUP": group, "COLUMNS": columns}
    return sizes, programs, {name: launch[name] for name in ("num_warps", "num_stages")}
