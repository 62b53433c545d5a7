"""Frozen Linears with weights of 8 bits: float8_e4m3fn, and a scale for each row. Products are in another dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.anima_runtime.kernels import kernels_of

_LARGEST = 448.0  # of e4m3fn


class Float8Linear(nn.Linear):
    """A Linear of which `quantise` rounded the weights. product_dtype: what they were, and products are in."""

    scale_O1: Tensor
    product_dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        output = _Float8Product.apply(x, self.weight, self.scale_O1)
        return output if self.bias is None else output + self.bias


class _Float8Product(torch.autograd.Function):
    """x Wᵀ in x's dtype. Only the 8-bit weight is kept for the backward pass, which has a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, scale_O1: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_O1)
        return F.linear(x, _dequantised(weight_OI, scale_O1, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return grad_output @ _dequantised(*ctx.saved_tensors, grad_output.dtype), None, None


@torch.no_grad()
def quantise(linear: nn.Linear) -> None:
    """Rounds a Linear's weights to 8 bits, in place: hooks on it stay."""
    linear.product_dtype = linear.weight.dtype
    weight = linear.weight.float()
    scale_O1 = (weight.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=1e-12)
    linear.weight = nn.Parameter((weight / scale_O1).to(torch.float8_e4m3fn), requires_grad=False)
    linear.register_buffer("scale_O1", scale_O1)
    linear.__class__ = Float8Linear


def write_out(weight_OI: Tensor, scale_O1: Tensor | None, up_OR: Tensor, down_RI: Tensor) -> Tensor:
    """[[W, up], [down, 0]] in the dtype of up and down, to which W is rounded once. scale: None for 1."""
    (out_width, in_width), ranks = weight_OI.shape, len(down_RI)
    if weight_OI.is_cuda:
        whole = down_RI.new_empty(out_width + ranks, in_width + ranks)
        kernels_of("float8").write_out(weight_OI, scale_O1, up_OR, down_RI, whole)
        return whole
    whole = down_RI.new_zeros(out_width + ranks, in_width + ranks)
    whole[:out_width, :in_width] = weight_OI if scale_O1 is None else _dequantised(weight_OI, scale_O1, whole.dtype)
    whole[:out_width, in_width:] = up_OR
    whole[out_width:, :in_width] = down_RI
    return whole


def _dequantised(weight_OI: Tensor, scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight_OI.to(torch.promote_types(dtype, torch.float32)) * scale_O1).to(dtype)
