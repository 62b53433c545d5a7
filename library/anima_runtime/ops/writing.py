"""Weights written out for a product, with LoRA's factors beside them: those of 8 bits, and those of swapped blocks.

In plain PyTorch; on CUDA `writing_kernels` does it in one pass.
"""

from __future__ import annotations

from torch import Tensor

from library.anima_runtime.memory.float8 import dequantised
from library.anima_runtime.ops.kernels import kernels_of


def write_out(weight_OI: Tensor, scale_O1: Tensor | None, up_OR: Tensor, down_RI: Tensor) -> Tensor:
    """[[W, up], [down, 0]] in the dtype of up and down, to which W is rounded once. scale: None for 1."""
    (out_width, in_width), ranks = weight_OI.shape, len(down_RI)
    if weight_OI.is_cuda:
        whole = down_RI.new_empty(out_width + ranks, in_width + ranks)
        kernels_of("writing").write_out(weight_OI, scale_O1, up_OR, down_RI, whole)
        return whole
    whole = down_RI.new_zeros(out_width + ranks, in_width + ranks)
    whole[:out_width, :in_width] = weight_OI if scale_O1 is None else dequantised(weight_OI, scale_O1, whole.dtype)
    whole[:out_width, in_width:] = up_OR
    whole[out_width:, :in_width] = down_RI
    return whole
