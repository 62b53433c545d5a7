"""Pieces shared by the transformer and the LLM adapter: RMSNorm, rotary position embedding, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# cos and sin of every position's angles, both (L, K) float32 with K half the head size.
RotaryTables = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight over the last dimension, with float32 statistics, in x's dtype."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


def residual_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """The residual stream goes beyond float16's 65504, so float16 weights work on a float32 stream."""
    return torch.float32 if weight_dtype == torch.float16 else weight_dtype


def axis_angles(length: int, size: int, theta: float, device: torch.device) -> torch.Tensor:
    """Rotary angles p * theta^(-2k / size) for positions p from 0 and k < size / 2: (length, size / 2) float32.

    Source: Su et al., RoFormer, arXiv 2104.09864, section 3.2.2.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    positions = torch.arange(length, dtype=torch.float32, device=device)
    return torch.outer(positions, theta**-exponents)


def rotary_tables(angles_LK: torch.Tensor) -> RotaryTables:
    """What `rotate` takes, from each position's angles."""
    return angles_LK.cos(), angles_LK.sin()


def rotate(x_BLHD: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
    """Rotates dimension k with k + D/2 by the position's k-th angle, in float32; returns x's dtype."""
    cos_L1K, sin_L1K = (table[:, None] for table in tables)
    first, second = x_BLHD.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos_L1K - second * sin_L1K, second * cos_L1K + first * sin_L1K], dim=-1)
    return rotated.to(x_BLHD.dtype)


def split_heads(x_BLE: torch.Tensor, head_size: int) -> torch.Tensor:
    """(B, L, heads * D) to (B, L, heads, D)."""
    return x_BLE.unflatten(-1, (-1, head_size))


def attend(
    q_BLHD: torch.Tensor, k_BSHD: torch.Tensor, v_BSHD: torch.Tensor, mask_BS: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v for every head, joined to (B, L, H * D).

    mask: True for the keys that take part, or what is added to their products: 0, and -inf for those that do not.
    """
    mask_B11S = None if mask_BS is None else mask_BS[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11S).transpose(1, 2).flatten(2)
