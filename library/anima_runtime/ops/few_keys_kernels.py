"""Triton kernels of attention to so few keys that all fit one tile, and to further keys of zeros.

q and k come as their products give them: the kernels norm their heads, so that normed ones are never in memory. With
all of a query's logits at hand the softmax needs no second pass. The backward pass makes p, the probabilities, again by
the logarithm of the sum of all exp(logit), which the forward pass leaves; with dp = dout vᵀ, and q and k normed,

    dlogits = p (dp - Σ p dp),  dq = dlogits k,  dk = dlogitsᵀ q,  dv = pᵀ dout

p and dp have a row for each key there: so laid out, they go from registers into the products with dout and q. Zero
keys add their number times exp(0) to the denominator, and nothing else, as their values and so their dp are 0. Each
program of the backward pass leaves its share of dk and dv, and these are added in a fixed order. Imported on CUDA only.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_KEYS = 128
# Rows (queries) a program takes at a time, and its warps; measured on an H200 (docs/performance.md).
FORWARD_LAUNCH = {"ROWS": 128, "num_warps": 8, "num_stages": 3}
BACKWARD_LAUNCH = {"ROWS": 64, "num_warps": 8, "num_stages": 3}
# In all, that a launch aims at: one a multiprocessor, each of which takes rows again and again.
PROGRAMS = 132
_EPS = 1e-6
_LOG2_E = 1.4426950408889634


@triton.jit
def _tile(x, sample, head, rows, count, sample_stride, row_stride, SIZE: tl.constexpr):
    """[rows, SIZE] of one head."""
    columns = tl.arange(0, SIZE)
    start = x + sample.to(tl.int64) * sample_stride + head * SIZE
    return tl.load(start + rows[:, None] * row_stride + columns[None, :], mask=(rows < count)[:, None], other=0.0)


@triton.jit
def _normed(x, weight, eps, SIZE: tl.constexpr):
    """Each row's RMSNorm, rounded to x's dtype."""
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + eps)
    return (wide * rstd[:, None] * weight[None, :]).to(x.dtype)


@triton.jit
def _attend_few_keys(
    q, k, v, q_weight, k_weight, out, lse, length, heads, key_count, zeros, scale, eps,
    q_sample, q_row, k_sample, k_row, v_sample, v_row, KEYS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    keys, columns, row_stride = tl.arange(0, KEYS), tl.arange(0, SIZE), heads * SIZE
    q_norm = tl.load(q_weight + columns)
    k_KD = _tile(k, sample, head, keys, key_count, k_sample, k_row, SIZE)
    k_KD = _normed(k_KD, tl.load(k_weight + columns), eps, SIZE)
    v_KD = _tile(v, sample, head, keys, key_count, v_sample, v_row, SIZE)
    for first in range(tl.program_id(0) * ROWS, length, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        q_RD = _normed(_tile(q, sample, head, rows, length, q_sample, q_row, SIZE), q_norm, eps, SIZE)
        logits = tl.dot(q_RD, tl.trans(k_KD), input_precision="ieee") * scale
        logits = tl.where((keys < key_count)[None, :], logits, float("-inf"))
        own = tl.max(logits, 1)
        with_zeros = tl.maximum(own, 0.0)
        most = tl.where(zeros > 0, with_zeros, own)
        p = tl.exp2(logits - most[:, None])
        total = tl.sum(p, 1) + zeros * tl.exp2(-with_zeros)
        p = p / total[:, None]
        value = tl.dot(p.to(v_KD.dtype), v_KD, input_precision="ieee")
        here = (sample.to(tl.int64) * length + rows)[:, None] * row_stride + head * SIZE + columns[None, :]
        tl.store(out + here, value.to(out.dtype.element_ty), mask=(rows < length)[:, None])
        tl.store(lse + tl.program_id(1).to(tl.int64) * length + rows, most + tl.log2(total), mask=rows < length)


@triton.jit
def _attend_few_keys_backward(
    q, k, v, q_weight, k_weight, dout, lse, dq, partial, length, heads, key_count, scale, factor, eps,
    q_sample, q_row, k_sample, k_row, v_sample, v_row, dout_sample, dout_row,
    KEYS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    keys, columns, row_stride = tl.arange(0, KEYS), tl.arange(0, SIZE), heads * SIZE
    kept = (keys < key_count)[:, None]
    q_norm = tl.load(q_weight + columns)
    k_KD = _tile(k, sample, head, keys, key_count, k_sample, k_row, SIZE)
    k_KD = _normed(k_KD, tl.load(k_weight + columns), eps, SIZE)
    v_KD = _tile(v, sample, head, keys, key_count, v_sample, v_row, SIZE)
    dk = tl.zeros((KEYS, SIZE), tl.float32)
    dv = tl.zeros((KEYS, SIZE), tl.float32)
    for first in range(tl.program_id(0) * ROWS, length, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        q_RD = _normed(_tile(q, sample, head, rows, length, q_sample, q_row, SIZE), q_norm, eps, SIZE)
        dout_RD = _tile(dout, sample, head, rows, length, dout_sample, dout_row, SIZE)
        own_lse = tl.load(lse + tl.program_id(1).to(tl.int64) * length + rows, mask=rows < length, other=0.0)
        logits = tl.dot(k_KD, tl.trans(q_RD), input_precision="ieee") * scale
        p = tl.where(kept, tl.exp2(logits - own_lse[None, :]), 0.0)
        dp = tl.dot(v_KD, tl.trans(dout_RD), input_precision="ieee")
        dlogits = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(k_KD.dtype)
        dv = tl.dot(p.to(v_KD.dtype), dout_RD, dv, input_precision="ieee")
        dk = tl.dot(dlogits, q_RD, dk, input_precision="ieee")
        value = tl.dot(tl.trans(dlogits), k_KD, input_precision="ieee") * factor
        here = (sample.to(tl.int64) * length + rows)[:, None] * row_stride + head * SIZE + columns[None, :]
        tl.store(dq + here, value.to(dq.dtype.element_ty), mask=(rows < length)[:, None])
    # partial: [samples, programs, 2, keys, heads * SIZE]
    share = (sample.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * key_count * row_stride
    here = keys[:, None] * row_stride + head * SIZE + columns[None, :]
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

    The backward pass takes 193 KiB for heads of 128 (Triton 3.6): Hopper has 227, an A100 163, RTX cards 99.
    """
    q, k = (torch.zeros(1, length, 16, size, dtype=torch.bfloat16, device=device) for length in (256, MOST_KEYS))
    weight, lse = torch.ones(size, device=device), torch.zeros(16, 256, device=device)
    try:
        attend_few_keys_backward(q, k, k, (weight, weight), lse, q.flatten(2))
    except triton.OutOfResources:
        return False
    return True


def attend_few_keys(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, weights: tuple[Tensor, Tensor], zeros: int
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt(D)) v over the keys and so many zero keys, joined to (B, L, heads * D), q and k normed.

    Also, for the backward pass, the logarithm to base 2 of the sum of exp(logit) over all keys, [B * heads, L].
    weights: of the norms of q's and k's heads, [D] each. Heads of a row follow each other in q, k and v; rows may be
    any distance apart.
    """
    samples, length, heads, size = q_BLHD.shape
    out = q_BLHD.new_empty(samples, length, heads * size)
    lse = q_BLHD.new_empty(samples * heads, length, dtype=torch.float32)
    _attend_few_keys[_grid(q_BLHD, FORWARD_LAUNCH["ROWS"])](
        q_BLHD, k_BSHD, v_BSHD, *weights, out, lse, length, heads, k_BSHD.shape[1], float(zeros), _LOG2_E * size**-0.5,
        _EPS, *_strides(q_BLHD, k_BSHD, v_BSHD), KEYS=_padded(k_BSHD), SIZE=size, **FORWARD_LAUNCH,
    )  # fmt: skip
    return out, lse


def attend_few_keys_backward(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, weights: tuple[Tensor, Tensor], lse: Tensor, dout_BLE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of normed q, in q's dtype, and of v and normed k, in float32, from what `attend_few_keys` took."""
    (samples, length, heads, size), keys = q_BLHD.shape, k_BSHD.shape[1]
    grid = _grid(q_BLHD, BACKWARD_LAUNCH["ROWS"])
    dq = torch.empty(q_BLHD.shape, dtype=q_BLHD.dtype, device=q_BLHD.device)
    partial = q_BLHD.new_empty(samples, grid[0], 2, keys, heads, size, dtype=torch.float32)
    _attend_few_keys_backward[grid](
        q_BLHD, k_BSHD, v_BSHD, *weights, dout_BLE, lse, dq, partial, length, heads, keys, _LOG2_E * size**-0.5,
        size**-0.5, _EPS, *_strides(q_BLHD, k_BSHD, v_BSHD, dout_BLE), KEYS=_padded(k_BSHD), SIZE=size,
        **BACKWARD_LAUNCH,
    )  # fmt: skip
    dk, dv = partial.sum(1).unbind(1)
    return dq, dk, dv


def _grid(q_BLHD: Tensor, rows: int) -> tuple[int, int]:
    """Programs of each head, and the heads of all samples."""
    samples, length, heads, _ = q_BLHD.shape
    return min(max(1, PROGRAMS // (samples * heads)), triton.cdiv(length, rows)), samples * heads


def _padded(k_BSHD: Tensor) -> int:
    """The number of keys of a tile, of which matrix units take 16 at least."""
    return max(16, triton.next_power_of_2(k_BSHD.shape[1]))


def _strides(*tensors: Tensor) -> list[int]:
    return [tensor.stride(dimension) for tensor in tensors for dimension in (0, 1)]
