"""Small matrices that mix the parts of long rows: what a Kronecker product does beside one matrix product.

Of rows seen as I parts of K columns, a matrix w [O, I] makes O parts; several matrices M do so side by side. Tensors
[M, N, I, K] may be views of any strides, but for columns, which follow each other. Written out in plain PyTorch; on
CUDA `mixing_kernels` computes the same in one pass over memory.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def mix(w_MOI: Tensor, x_MNIK: Tensor, out_MNOK: Tensor) -> None:
    """Writes Σ over i of w[o, i] x[n, i] to out."""
    if x_MNIK.is_cuda and _kernels().mixes(w_MOI):
        _kernels().mix(w_MOI, x_MNIK, out_MNOK)
    else:
        out_MNOK.copy_(torch.matmul(w_MOI[:, None], x_MNIK))


def mix_backward(
    w_MOI: Tensor, dout_MNOK: Tensor, x_MNIK: Tensor, dx_MNIK: Tensor, again_MNOK: Tensor | None = None
) -> Tensor:
    """Gradients of `mix`: that of x is written to dx, that of w [M, O, I] returned, in float32 at least.

    again: where the forward pass' result is written once more, from the same reading of x, if wanted.
    """
    if x_MNIK.is_cuda and _kernels().mixes(w_MOI):
        return _kernels().mix_backward(w_MOI, dout_MNOK, x_MNIK, dx_MNIK, again_MNOK)
    if again_MNOK is not None:
        mix(w_MOI, x_MNIK, again_MNOK)
    mix(w_MOI.transpose(1, 2), dout_MNOK, dx_MNIK)
    products_MNOI = torch.matmul(dout_MNOK, x_MNIK.transpose(2, 3))
    return products_MNOI.sum(1, dtype=torch.promote_types(w_MOI.dtype, torch.float32))


def _kernels() -> ModuleType:
    """Triton is there on CUDA only, and takes a while to import."""
    from library.anima_runtime import mixing_kernels

    return mixing_kernels
