"""A Triton kernel for the gradients of LoRA's factors; imported on CUDA only.

Both are products of a wide and a thin matrix over all rows, [N, wide]ᵀ [N, thin], which take as long as reading the
wide one. Libraries cut the rows up among programs and add their shares in a second kernel; here each program has some
columns of the wide matrix to itself, all rows of them, and one launch serves both products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program's columns; rows at a time where programs have a multiprocessor each, with up to 16 ranks in all and with
# more, and where some share one. Measured on an H200 (docs/performance.md).
LAUNCH = {"COLUMNS": 64, "num_warps": 4}
THIN_LAUNCH = {"ROWS": 128, "num_stages": 5}
FEW_LAUNCH = {"ROWS": 64, "num_stages": 6}
MANY_LAUNCH = {"ROWS": 128, "num_stages": 3}
_THIN_RANKS = 16
_MULTIPROCESSORS = 132
# Ranks of all Linears together: of more, a program's rows would not fit the shared memory of RTX cards.
_MOST_RANKS = 64


@triton.jit
def _thin_product(
    wide, thin, columns, ranks, rank_count, count, wide_stride, thin_stride, ROWS: tl.constexpr, EVEN: tl.constexpr
):
    """[columns, ranks], float32. rank_count: those that there are. EVEN: ROWS divides the count of rows."""
    total = tl.zeros((columns.shape[0], ranks.shape[0]), tl.float32)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        kept, here = (rows < count)[:, None], rows.to(tl.int64)[:, None]
        left = wide + here * wide_stride + columns[None, :]
        a = tl.load(left) if EVEN else tl.load(left, mask=kept, other=0.0)
        b = tl.load(thin + here * thin_stride + ranks[None, :], mask=kept & (ranks < rank_count)[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    return total


@triton.jit
def _factor_gradients(
    dy, hidden, x, dhidden, dup, ddown, count, dy_stride, hidden_stride, x_stride, dhidden_stride, out_tiles, in_width,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if tile < out_tiles:
        columns, own_ranks = tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK)
        own = hidden + tile * COLUMNS // WIDTH * RANK  # of the Linear that these columns are of
        up = _thin_product(dy, own, columns, own_ranks, RANK, count, dy_stride, hidden_stride, ROWS, EVEN)
        tl.store(dup + columns[:, None] * RANK + own_ranks[None, :], up)
    else:
        columns, ranks = (tile - out_tiles) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
        down = _thin_product(x, dhidden, columns, ranks, RANKS, count, x_stride, dhidden_stride, ROWS, EVEN)
        tl.store(ddown + ranks[None, :] * in_width + columns[:, None], down, mask=(ranks < RANKS)[None, :])


def suits(width: int, in_width: int, rank: int, linears: int) -> bool:
    """Whether the kernel takes so many Linears [width, in] with LoRAs of that rank."""
    fill = width % LAUNCH["COLUMNS"] == 0 and in_width % LAUNCH["COLUMNS"] == 0
    return fill and rank in (16, 32, 64) and rank * linears <= _MOST_RANKS


def factor_gradients(
    dy_NO: Tensor, hidden_NR: Tensor, x_NI: Tensor, dhidden_NR: Tensor, linears: int
) -> tuple[Tensor, Tensor]:
    """Of y = x Wᵀ + h Bᵀ with h = x Aᵀ: of B, dyᵀ h [out, rank], and of A, dhᵀ x [ranks, in], float32.

    linears: how many share x; each has its own columns of dy, h and dh. Rows may lie apart in memory, columns not.
    """
    (count, out_width), in_width, ranks = dy_NO.shape, x_NI.shape[1], hidden_NR.shape[1]
    dup = dy_NO.new_empty(out_width, ranks // linears, dtype=torch.float32)
    ddown = dy_NO.new_empty(ranks, in_width, dtype=torch.float32)
    out_tiles, in_tiles = out_width // LAUNCH["COLUMNS"], in_width // LAUNCH["COLUMNS"]
    own = THIN_LAUNCH if ranks <= _THIN_RANKS else FEW_LAUNCH
    launch = LAUNCH | (own if out_tiles + in_tiles <= _MULTIPROCESSORS else MANY_LAUNCH)
    _factor_gradients[(out_tiles + in_tiles,)](
        dy_NO, hidden_NR, x_NI, dhidden_NR, dup, ddown, count,
        dy_NO.stride(0), hidden_NR.stride(0), x_NI.stride(0), dhidden_NR.stride(0), out_tiles, in_width,
        WIDTH=out_width // linears, RANK=ranks // linears, RANKS=ranks, PADDED=triton.next_power_of_2(ranks),
        EVEN=count % launch["ROWS"] == 0, **launch,
    )  # fmt: skip
    return dup, ddown
