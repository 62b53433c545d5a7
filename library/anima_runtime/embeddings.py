"""What goes into the transformer's blocks: image patches as tokens, the time, and the tokens' positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from library.anima_runtime.attention import RotaryTables, axis_angles, rotary_tables

_ROTARY_THETA = 10000.0
# For pictures larger than the base model's, theta grows by 4^(d / (d - 2)) along h and w.
_SPATIAL_STRETCH = 4.0


class Patchify(nn.Module):
    """(B, C, T, H, W) to tokens (B, T * H/p * W/p, C * p * p), their features ordered (channel, row, column)."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        p = self.patch_size
        x_BCThpwp = x_BCTHW.unflatten(4, (-1, p)).unflatten(3, (-1, p))
        return x_BCThpwp.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


class PatchEmbedding(nn.Module):
    """Latents (B, C, T, H, W), with an all-zero padding mask as their last channel, to tokens (B, L, width)."""

    def __init__(self, latent_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        features = (latent_channels + 1) * patch_size**2
        self.proj = nn.Sequential(Patchify(patch_size), nn.Linear(features, width, bias=False))

    def forward(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        with_padding_mask = F.pad(latents_BCTHW, (0, 0, 0, 0, 0, 0, 0, 1))
        return self.proj(with_padding_mask)


class TimeSinusoid(nn.Module):
    """[cos(t f_k), sin(t f_k)] with f_k = 10000^(-2k / width): (B,) to (B, width), float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timesteps_B: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps_B.device) / half
        angles = timesteps_B.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeMLP(nn.Module):
    """The modulation that all branches share: shift, scale and gate (B, 3 * width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, sinusoid_BD: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid_BD)))


def grid_rotary_tables(grid: tuple[int, int, int], head_size: int, device: torch.device) -> RotaryTables:
    """cos and sin of the angles of all tokens of a (frames, rows, columns) grid, counted from the top left.

    A head's angles are those of t, h and w in this order; h and w take a third of the head each, rounded down.
    """
    frames, rows, columns = grid
    spatial_size = 2 * (head_size // 6)
    spatial_theta = _ROTARY_THETA * _SPATIAL_STRETCH ** (spatial_size / (spatial_size - 2))
    t_TK = axis_angles(frames, head_size - 2 * spatial_size, _ROTARY_THETA, device)
    h_HK = axis_angles(rows, spatial_size, spatial_theta, device)
    w_WK = axis_angles(columns, spatial_size, spatial_theta, device)
    angles_THWK = torch.cat(
        [
            t_TK[:, None, None].expand(-1, rows, columns, -1),
            h_HK[None, :, None].expand(frames, -1, columns, -1),
            w_WK[None, None].expand(frames, rows, -1, -1),
        ],
        dim=-1,
    )
    return rotary_tables(angles_THWK.flatten(0, 2))
