"""A Triton kernel of `writing`: weights, which may have 8 bits, written out for a product. Imported on CUDA only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program's tile.
LAUNCH = {"ROWS": 8, "COLUMNS": 256, "num_warps": 4}


@triton.jit
def _write_out(
    weight, scale, up, down, whole, out_width, in_width, ranks, up_stride, down_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows and columns of [[W, up], [down, 0]].

    e4m3 has the bits of a float16 with an exponent of one bit less, whose bias is 8 less: shifted there, it is a
    float16 of 2⁻⁸ times its value. Not all cards know the type itself.
    """
    width = in_width + ranks
    chunks = tl.cdiv(width, COLUMNS)
    rows = (tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS))[:, None]
    columns = (tl.program_id(0) % chunks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    is_base, inside, here = rows < out_width, columns < in_width, rows.to(tl.int64)
    is_up, is_down = is_base & ~inside & (columns < width), ~is_base & inside & (rows < out_width + ranks)
    value = tl.load(weight + here * in_width + columns, mask=is_base & inside, other=0)
    if scale is not None:
        bits = value.to(tl.int16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value *= tl.load(scale + rows, mask=is_base, other=0.0)
    value += tl.load(up + here * up_stride + columns - in_width, mask=is_up, other=0.0)
    value += tl.load(down + (here - out_width) * down_stride + columns, mask=is_down, other=0.0)
    kept = (rows < out_width + ranks) & (columns < width)
    tl.store(whole + here * width + columns, value.to(whole.dtype.element_ty), mask=kept)


def write_out(weight_OI: Tensor, scale_O1: Tensor | None, up_OR: Tensor, down_RI: Tensor, whole: Tensor) -> None:
    """See `writing.write_out`."""
    (out_width, in_width), ranks = weight_OI.shape, len(down_RI)
    values_OI = weight_OI if scale_O1 is None else weight_OI.view(torch.uint8)
    programs = triton.cdiv(len(whole), LAUNCH["ROWS"]) * triton.cdiv(in_width + ranks, LAUNCH["COLUMNS"])
    _write_out[(programs,)](
        values_OI, scale_O1, up_OR, down_RI, whole, out_width, in_width, ranks, up_OR.stride(0), down_RI.stride(0),
        **LAUNCH,
    )  # fmt: skip
