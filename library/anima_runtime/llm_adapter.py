"""The LLM adapter: turns a caption's Qwen3 states into context rows, one for each of its T5 tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from library.anima_runtime.attention import (
    RMSNorm,
    RotaryTables,
    attend,
    axis_angles,
    residual_dtype,
    rotary_tables,
    rotate,
    split_heads,
)
from library.anima_runtime.config import LLMAdapterConfig

_ROTARY_THETA = 10000.0

# (x_BLD, mask_BL, source_BSD, source_mask_BS) -> context_BLD: embedded T5 tokens to their context rows.
RowsFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class AdapterAttention(nn.Module):
    """Attention of the T5 rows to themselves or to the Qwen states, either side rotated from position 0."""

    def __init__(self, config: LLMAdapterConfig, source_width: int) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(source_width, config.width, bias=False)
        self.v_proj = nn.Linear(source_width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_size)
        self.k_norm = RMSNorm(config.head_size)

    def forward(
        self,
        x_BLD: torch.Tensor,
        x_rotary: RotaryTables,
        source_BSD: torch.Tensor,
        source_rotary: RotaryTables,
        source_mask_BS: torch.Tensor,
    ) -> torch.Tensor:
        q = rotate(self.q_norm(split_heads(self.q_proj(x_BLD), self.head_size)), x_rotary)
        k = rotate(self.k_norm(split_heads(self.k_proj(source_BSD), self.head_size)), source_rotary)
        v = split_heads(self.v_proj(source_BSD), self.head_size)
        return self.o_proj(attend(q, k, v, source_mask_BS))


class AdapterBlock(nn.Module):
    """x += f(RMSNorm(x)), with f self-attention, cross-attention and MLP in turn."""

    def __init__(self, config: LLMAdapterConfig) -> None:
        super().__init__()
        self.norm_self_attn = RMSNorm(config.width)
        self.self_attn = AdapterAttention(config, config.width)
        self.norm_cross_attn = RMSNorm(config.width)
        self.cross_attn = AdapterAttention(config, config.source_width)
        self.norm_mlp = RMSNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.mlp_width), nn.GELU(), nn.Linear(config.mlp_width, config.width)
        )

    def forward(
        self,
        x_BLD: torch.Tensor,
        mask_BL: torch.Tensor,
        rotary: RotaryTables,
        source_BSD: torch.Tensor,
        source_mask_BS: torch.Tensor,
        source_rotary: RotaryTables,
    ) -> torch.Tensor:
        dtype = source_BSD.dtype
        h = self.norm_self_attn(x_BLD).to(dtype)
        x_BLD = x_BLD + self.self_attn(h, rotary, h, rotary, mask_BL)
        h = self.norm_cross_attn(x_BLD).to(dtype)
        x_BLD = x_BLD + self.cross_attn(h, rotary, source_BSD, source_rotary, source_mask_BS)
        h = self.norm_mlp(x_BLD).to(dtype)
        return x_BLD + self.mlp(h)


class LLMAdapter(nn.Module):
    """Embedded T5 ids look at each other and at the Qwen states, layer by layer; its output is the text context.

    run_rows: how all behind the embedding is computed: module by module, unless something faster takes its place.
    """

    def __init__(self, config: LLMAdapterConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.run_rows: RowsFunction = self._run_rows_in_turn
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(AdapterBlock(config) for _ in range(config.depth))
        self.out_proj = nn.Linear(config.width, config.context_width)
        self.norm = RMSNorm(config.context_width)

    def forward(
        self,
        qwen_states_BSD: torch.Tensor,
        qwen_mask_BS: torch.Tensor,
        t5_ids_BL: torch.Tensor,
        t5_mask_BL: torch.Tensor,
    ) -> torch.Tensor:
        """Context rows (B, L, context width) in the weights' dtype.

        Masks are bool, True for real tokens, of which each caption has at least one of either kind. Only real tokens
        are attended to, and the rows of padded T5 tokens are exactly zero.
        """
        dtype = self.norm.weight.dtype
        x_BLD = self.embed(t5_ids_BL).to(residual_dtype(dtype))
        context_BLD = self.run_rows(x_BLD, t5_mask_BL, qwen_states_BSD.to(dtype), qwen_mask_BS)
        return context_BLD.masked_fill(~t5_mask_BL[..., None], 0)

    def _run_rows_in_turn(
        self, x_BLD: torch.Tensor, mask_BL: torch.Tensor, source_BSD: torch.Tensor, source_mask_BS: torch.Tensor
    ) -> torch.Tensor:
        rotary, source_rotary = (self.rotary(mask.shape[1], mask.device) for mask in (mask_BL, source_mask_BS))
        for block in self.blocks:
            x_BLD = block(x_BLD, mask_BL, rotary, source_BSD, source_mask_BS, source_rotary)
        return self.norm(self.out_proj(x_BLD.to(source_BSD.dtype)))

    def rotary(self, length: int, device: torch.device) -> RotaryTables:
        """Tables of so many positions, from 0."""
        return rotary_tables(axis_angles(length, self.head_size, _ROTARY_THETA, device))
