"""Triton kernels of attention to so few keys that all fit one tile, and to further keys of zeros.

With all of a query's logits at hand the softmax needs no second pass, forward or backward, and the backward pass needs
nothing but q, k, v and dout: with p the probabilities and dp = dout vᵀ,

    dlogits = p (dp - Σ p dp),  dq = dlogits k,  dk = dlogitsᵀ q,  dv = pᵀ dout

Zero keys add their number times exp(0) to the denominator, and nothing else, as their values and so their dp are 0.
Each program of the backward pass leaves its share of dk and dv, and these are added in a fixed order. Imported on CUDA
only.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_KEYS = 128
# Rows (queries) a program takes at a time, and its warps; measured on an H200 (docs/performance.md). PROGRAMS: in all,
# that the backward pass aims at.
FORWARD_LAUNCH = {"ROWS": 64, "num_warps": 4}
BACKWARD_LAUNCH = {"ROWS": 128, "num_warps": 8, "num_stages": 2, "PROGRAMS": 132}
_LOG2_E = 1.4426950408889634


@triton.jit
def _tile(x, sample, head, rows, count, sample_stride, row_stride, SIZE: tl.constexpr):
    """[rows, SIZE] of one head."""
    columns = tl.arange(0, SIZE)
    start = x + sample.to(tl.int64) * sample_stride + head * SIZE
    return tl.load(start + rows[:, None] * row_stride + columns[None, :], mask=(rows < count)[:, None], other=0.0)


@triton.jit
def _probabilities(q, k, key_count, zeros, scale, KEYS: tl.constexpr):
    """Of these queries and all keys, float32. scale: of logits as powers of 2."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    logits = tl.where((tl.arange(0, KEYS) < key_count)[None, :], logits, float("-inf"))
    own = tl.max(logits, 1)
    with_zeros = tl.maximum(own, 0.0)
    most = tl.where(zeros > 0, with_zeros, own)
    p = tl.exp2(logits - most[:, None])
    return p / (tl.sum(p, 1) + zeros * tl.exp2(-with_zeros))[:, None]


@triton.jit
def _attend_few_keys(
    q, k, v, out, length, heads, key_count, zeros, scale,
    q_sample, q_row, k_sample, k_row, v_sample, v_row, KEYS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows, keys = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS)
    q_RD = _tile(q, sample, head, rows, length, q_sample, q_row, SIZE)
    k_KD = _tile(k, sample, head, keys, key_count, k_sample, k_row, SIZE)
    p = _probabilities(q_RD, k_KD, key_count, zeros, scale, KEYS)
    v_KD = _tile(v, sample, head, keys, key_count, v_sample, v_row, SIZE)
    value = tl.dot(p.to(v_KD.dtype), v_KD, input_precision="ieee")
    row_stride = heads * SIZE
    here = (sample.to(tl.int64) * length + rows)[:, None] * row_stride + head * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + here, value.to(out.dtype.element_ty), mask=(rows < length)[:, None])


@triton.jit
def _attend_few_keys_backward(
    q, k, v, dout, dq, partial, length, heads, key_count, zeros, scale, factor,
    q_sample, q_row, k_sample, k_row, v_sample, v_row, dout_sample, dout_row,
    KEYS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    keys, columns, row_stride = tl.arange(0, KEYS), tl.arange(0, SIZE), heads * SIZE
    k_KD = _tile(k, sample, head, keys, key_count, k_sample, k_row, SIZE)
    v_KD = _tile(v, sample, head, keys, key_count, v_sample, v_row, SIZE)
    dk = tl.zeros((KEYS, SIZE), tl.float32)
    dv = tl.zeros((KEYS, SIZE), tl.float32)
    for first in range(tl.program_id(0) * ROWS, length, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        q_RD = _tile(q, sample, head, rows, length, q_sample, q_row, SIZE)
        dout_RD = _tile(dout, sample, head, rows, length, dout_sample, dout_row, SIZE)
        p = _probabilities(q_RD, k_KD, key_count, zeros, scale, KEYS)
        dp = tl.dot(dout_RD, tl.trans(v_KD), input_precision="ieee")
        dlogits = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(k_KD.dtype)
        dv = tl.dot(tl.trans(p.to(v_KD.dtype)), dout_RD, dv, input_precision="ieee")
        dk = tl.dot(tl.trans(dlogits), q_RD, dk, input_precision="ieee")
        value = tl.dot(dlogits, k_KD, input_precision="ieee") * factor
        here = (sample.to(tl.int64) * length + rows)[:, None] * row_stride + head * SIZE + columns[None, :]
        tl.store(dq + here, value.to(dq.dtype.element_ty), mask=(rows < length)[:, None])
    # partial: [samples, programs, 2, keys, heads * SIZE]
    share = (sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * key_count * row_stride
    here = keys[:, None] * row_stride + head * SIZE + columns[None, :]
    kept = (keys < key_count)[:, None]
    tl.store(partial + share + here, dk * factor, mask=kept)
    tl.store(partial + share + key_count * row_stride + here, dv, mask=kept)


def attends(q_BLHD: Tensor, k_BSHD: Tensor) -> bool:
    """Whether the kernels can compute this."""
    size = q_BLHD.shape[3]
    takes = k_BSHD.shape[1] <= MOST_KEYS and q_BLHD.dtype == torch.bfloat16 and size in (32, 64, 128)
    return takes and _fits(q_BLHD.device, size)


@cache
def _fits(device: torch.device, size: int) -> bool:
    """Whether the card has the shared memory for heads of this size, found by running what takes most.

    The backward pass takes 224 KiB for heads of 128 (Triton 3.6): Hopper has 227, an A100 163, RTX cards 99.
    """
    q, k = (torch.zeros(1, length, 16, size, dtype=torch.bfloat16, device=device) for length in (256, MOST_KEYS))
    try:
        attend_few_keys_backward(q, k, k, q.flatten(2), zeros=1)
    except triton.OutOfResources:
        return False
    return True


def attend_few_keys(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, zeros: int) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v over the keys and so many zero keys, joined to (B, L, heads * D).

    Heads of a row follow each other in each of them; rows may be any distance apart.
    """
    samples, length, heads, size = q_BLHD.shape
    out = q_BLHD.new_empty(samples, length, heads * size)
    _attend_few_keys[(triton.cdiv(length, FORWARD_LAUNCH["ROWS"]), samples * heads)](
        q_BLHD, k_BSHD, v_BSHD, out, length, heads, k_BSHD.shape[1], float(zeros), _LOG2_E * size**-0.5,
        *_strides(q_BLHD, k_BSHD, v_BSHD), KEYS=_padded(k_BSHD), SIZE=size, **FORWARD_LAUNCH,
    )  # fmt: skip
    return out


def attend_few_keys_backward(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, dout_BLE: Tensor, zeros: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, in its dtype, and of k and v, in float32, as `attend_few_keys` takes them."""
    (samples, length, heads, size), keys = q_BLHD.shape, k_BSHD.shape[1]
    programs = max(1, BACKWARD_LAUNCH["PROGRAMS"] // (samples * heads))
    programs = min(programs, triton.cdiv(length, BACKWARD_LAUNCH["ROWS"]))
    dq = torch.empty(q_BLHD.shape, dtype=q_BLHD.dtype, device=q_BLHD.device)
    partial = q_BLHD.new_empty(samples, programs, 2, keys, heads, size, dtype=torch.float32)
    launch = {name: value for name, value in BACKWARD_LAUNCH.items() if name != "PROGRAMS"}
    _attend_few_keys_backward[(programs, samples * heads)](
        q_BLHD, k_BSHD, v_BSHD, dout_BLE, dq, partial, length, heads, keys, float(zeros), _LOG2_E * size**-0.5,
        size**-0.5, *_strides(q_BLHD, k_BSHD, v_BSHD, dout_BLE), KEYS=_padded(k_BSHD), SIZE=size, **launch,
    )  # fmt: skip
    dk, dv = partial.sum(1).unbind(1)
    return dq, dk, dv


def _padded(k_BSHD: Tensor) -> int:
    """The number of keys of a tile, of which matrix units take 16 at least."""
    return max(16, triton.next_power_of_2(k_BSHD.shape[1]))


def _strides(*tensors: Tensor) -> list[int]:
    return [tensor.stride(dimension) for tensor in tensors for dimension in (0, 1)]
