"""Frozen Linears with weights of 8 bits: float8_e4m3fn, and a scale for each row. Products are in another dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        return F.linear(x, dequantised(weight_OI, scale_O1, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return grad_output @ dequantised(*ctx.saved_tensors, grad_output.dtype), None, None


@torch.no_grad()
def quantise(linear: nn.Linear) -> None:
    """Rounds a Linear's weights to 8 bits, in place: hooks on it stay."""
    linear.product_dtype = linear.weight.dtype
    weight = linear.weight.float()
    scale_O1 = (weight.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=1e-12)
    linear.weight = nn.Parameter((weight / scale_O1).to(torch.float8_e4m3fn), requires_grad=False)
    linear.register_buffer("scale_O1", scale_O1)
    linear.__class__ = Float8Linear


def dequantised(weight_OI: Tensor, scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that the numbers stand for, rounded once."""
    return (weight_OI.to(torch.promote_types(dtype, torch.float32)) * scale_O1).to(dtype)
