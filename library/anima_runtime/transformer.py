"""Anima's diffusion transformer, with the parameter names of its checkpoint.

Weights may be float32, bfloat16 or float16. Matrix products run in the weights' dtype; statistics of norms, time and
position angles in float32; the residual stream in the weights' dtype, or float32 for float16 weights.
No autocast is needed, and none should be active.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.anima_runtime.attention import RMSNorm, RotaryTables, attend, residual_dtype, rotate, split_heads
from library.anima_runtime.attention_backends import AttentionFunction
from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.embeddings import PatchEmbedding, TimeMLP, TimeSinusoid, grid_rotary_tables
from library.anima_runtime.llm_adapter import LLMAdapter

# (x_BLD, time_BD, shared_modulation_BK, context_BSD, rotary, zero_rows) -> x_BLD, as Block.forward takes and gives
# them; zero_rows as `AnimaTransformer.forward` does.
BlocksFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, RotaryTables, int], torch.Tensor]


class Attention(nn.Module):
    """Attention of the image tokens to themselves, rotated, or to the context, all of whose rows take part.

    The context's zero rows are part of the model, as attention sinks: there is no key mask.
    attend: how; see AnimaTransformer.use_attention.
    """

    def __init__(self, config: AnimaConfig, source_width: int) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.attend: AttentionFunction = attend
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(source_width, config.width, bias=False)
        self.v_proj = nn.Linear(source_width, config.width, bias=False)
        self.output_proj = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_size)
        self.k_norm = RMSNorm(config.head_size)

    def forward(
        self, x_BLD: torch.Tensor, source_BSD: torch.Tensor, rotary: RotaryTables | None = None
    ) -> torch.Tensor:
        q = self.q_norm(split_heads(self.q_proj(x_BLD), self.head_size))
        k = self.k_norm(split_heads(self.k_proj(source_BSD), self.head_size))
        v = split_heads(self.v_proj(source_BSD), self.head_size)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.output_proj(self.attend(q, k, v))


class MLP(nn.Module):
    """The same for every token: widen, GELU, narrow."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, hidden_width, bias=False)
        self.layer2 = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return self.layer2(F.gelu(self.layer1(x_BLD)))


class Block(nn.Module):
    """x += gate * f(LayerNorm(x) * (1 + scale) + shift), with f self-attention, cross-attention and MLP in turn."""

    def __init__(self, config: AnimaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.width)
        self.cross_attn = Attention(config, config.context_width)
        self.mlp = MLP(config.width, config.mlp_width)
        self.adaln_modulation_self_attn = _modulation(config, parts=3)
        self.adaln_modulation_cross_attn = _modulation(config, parts=3)
        self.adaln_modulation_mlp = _modulation(config, parts=3)
        self.recomputes = False

    def forward(
        self,
        x_BLD: torch.Tensor,
        time_BD: torch.Tensor,
        shared_modulation_BK: torch.Tensor,
        context_BSD: torch.Tensor,
        rotary: RotaryTables,
    ) -> torch.Tensor:
        """shared_modulation_BK: shift, scale and gate (K = 3 D) that are added to each branch's own.

        With `recomputes` only the inputs are kept for the backward pass. That is decided in here, so that a compiled
        block knows of it and leaves out what the backward pass does not need.
        """
        inputs = x_BLD, time_BD, shared_modulation_BK, context_BSD, rotary
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self._compute, *inputs, use_reentrant=False)
        return self._compute(*inputs)

    def _compute(
        self,
        x_BLD: torch.Tensor,
        time_BD: torch.Tensor,
        shared_modulation_BK: torch.Tensor,
        context_BSD: torch.Tensor,
        rotary: RotaryTables,
    ) -> torch.Tensor:
        stream_dtype, weight_dtype = x_BLD.dtype, context_BSD.dtype
        modulation = self.adaln_modulation_self_attn(time_BD) + shared_modulation_BK
        shift, scale, gate = _parts(modulation, 3, stream_dtype)
        h = _modulate(x_BLD, shift, scale).to(weight_dtype)
        x_BLD = x_BLD + gate * self.self_attn(h, h, rotary)

        modulation = self.adaln_modulation_cross_attn(time_BD) + shared_modulation_BK
        shift, scale, gate = _parts(modulation, 3, stream_dtype)
        h = _modulate(x_BLD, shift, scale).to(weight_dtype)
        x_BLD = x_BLD + gate * self.cross_attn(h, context_BSD)

        modulation = self.adaln_modulation_mlp(time_BD) + shared_modulation_BK
        shift, scale, gate = _parts(modulation, 3, stream_dtype)
        h = _modulate(x_BLD, shift, scale).to(weight_dtype)
        return x_BLD + gate * self.mlp(h)


class FinalLayer(nn.Module):
    """Modulated tokens to the features of their patches: (B, L, width) to (B, L, p * p * C)."""

    def __init__(self, config: AnimaConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.latent_channels * config.patch_size**2, bias=False)
        self.adaln_modulation = _modulation(config, parts=2)

    def forward(self, x_BLD: torch.Tensor, time_BD: torch.Tensor, shared_modulation_BK: torch.Tensor) -> torch.Tensor:
        own = self.adaln_modulation(time_BD)
        modulation = own + shared_modulation_BK[:, : own.shape[1]]
        shift, scale = _parts(modulation, 2, x_BLD.dtype)
        return self.linear(_modulate(x_BLD, shift, scale).to(time_BD.dtype))


def _modulation(config: AnimaConfig, parts: int) -> nn.Sequential:
    return nn.Sequential(
        nn.SiLU(),
        nn.Linear(config.width, config.adaln_rank, bias=False),
        nn.Linear(config.adaln_rank, parts * config.width, bias=False),
    )


def _parts(modulation_BK: torch.Tensor, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Cuts a modulation into its shift, scale (and gate), each (B, 1, D)."""
    return modulation_BK[:, None].to(dtype).chunk(count, dim=-1)


def _modulate(x_BLD: torch.Tensor, shift_B1D: torch.Tensor, scale_B1D: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6) * (1 + scale_B1D) + shift_B1D


class AnimaTransformer(nn.Module):
    """Predicts the velocity of a noisy latent. Build it under torch.device("meta") to load a checkpoint into it.

    lengths_vary: whether blocks that are compiled get one form for all numbers of tokens, rather than one for each.
    run_blocks: how the blocks are computed: each by its own forward, unless something faster takes its place.
    """

    def __init__(self, config: AnimaConfig) -> None:
        super().__init__()
        self.config = config
        self.lengths_vary = False
        self.run_blocks: BlocksFunction = self._run_blocks_in_turn
        self.x_embedder = PatchEmbedding(config.latent_channels, config.patch_size, config.width)
        self.t_embedder = nn.Sequential(TimeSinusoid(config.width), TimeMLP(config.width))
        self.t_embedding_norm = RMSNorm(config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.llm_adapter = LLMAdapter(config.llm_adapter)

    def use_attention(self, function: AttentionFunction) -> None:
        """Computes the blocks' attention by `function`; the LLM adapter's, which has masks, stays torch's."""
        for block in self.blocks:
            block.self_attn.attend = block.cross_attn.attend = function

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether only each block's input is kept for the backward pass, and the rest computed again there."""
        return self.blocks[0].recomputes

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        for block in self.blocks:
            block.recomputes = enabled

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.t_embedding_norm.weight.dtype

    def forward(
        self, latents_BCTHW: torch.Tensor, timesteps_B: torch.Tensor, context_BSD: torch.Tensor, zero_rows: int = 0
    ) -> torch.Tensor:
        """Velocity (noise minus picture), of the latents' shape, in float32.

        latents_BCTHW: normalised noisy latents; T is 1 for a picture, H and W are multiples of the patch size.
        timesteps_B: float32 in [0, 1], 1 being pure noise.
        context_BSD: what encode_context gives. zero_rows: how many of its last rows, all zero, were left out.
        """
        dtype = self.dtype
        context_BSD = context_BSD.to(dtype)
        sinusoid_BD = self.t_embedder[0](timesteps_B)
        shared_modulation_BK = self.t_embedder[1](sinusoid_BD.to(dtype))
        time_BD = self.t_embedding_norm(sinusoid_BD).to(dtype)
        rotary = grid_rotary_tables(self._grid(latents_BCTHW.shape), self.config.head_size, latents_BCTHW.device)
        x_BLD = self.x_embedder(latents_BCTHW.to(dtype)).to(residual_dtype(dtype))
        if self.lengths_vary:  # blocks are compiled; torch._dynamo, seconds of importing, is there for that
            torch._dynamo.maybe_mark_dynamic(x_BLD, 1)
            for table_LK in rotary:
                torch._dynamo.maybe_mark_dynamic(table_LK, 0)
        x_BLD = self.run_blocks(x_BLD, time_BD, shared_modulation_BK, context_BSD, rotary, zero_rows)
        features_BLF = self.final_layer(x_BLD, time_BD, shared_modulation_BK)
        return self._unpatchify(features_BLF.float(), latents_BCTHW.shape)

    def _run_blocks_in_turn(
        self,
        x_BLD: torch.Tensor,
        time_BD: torch.Tensor,
        shared_modulation_BK: torch.Tensor,
        context_BSD: torch.Tensor,
        rotary: RotaryTables,
        zero_rows: int,
    ) -> torch.Tensor:
        context_BSD = F.pad(context_BSD, (0, 0, 0, zero_rows))
        for block in self.blocks:
            x_BLD = block(x_BLD, time_BD, shared_modulation_BK, context_BSD, rotary)
        return x_BLD

    def encode_context(
        self,
        qwen_states_BSD: torch.Tensor,
        qwen_mask_BS: torch.Tensor,
        t5_ids_BL: torch.Tensor,
        t5_mask_BL: torch.Tensor,
        min_length: int = 512,
    ) -> torch.Tensor:
        """The text context (B, max(L, min_length), context width): the LLM adapter's rows, then zero rows.

        See LLMAdapter.forward for the arguments. Longer captions are used in full.
        """
        context_BLD = self.llm_adapter(qwen_states_BSD, qwen_mask_BS, t5_ids_BL, t5_mask_BL)
        return F.pad(context_BLD, (0, 0, 0, max(0, min_length - context_BLD.shape[1])))

    def _unpatchify(self, features_BLF: torch.Tensor, shape_BCTHW: torch.Size) -> torch.Tensor:
        """Tokens whose features are ordered (row, column, channel), unlike Patchify's, to (B, C, T, H, W)."""
        p = self.config.patch_size
        x_BThwppC = features_BLF.unflatten(2, (p, p, -1)).unflatten(1, self._grid(shape_BCTHW))
        return x_BThwppC.permute(0, 6, 1, 2, 4, 3, 5).reshape(shape_BCTHW)

    def _grid(self, shape_BCTHW: torch.Size) -> tuple[int, int, int]:
        """Frames, rows and columns of patches."""
        _, _, frames, height, width = shape_BCTHW
        return frames, height // self.config.patch_size, width // self.config.patch_size
