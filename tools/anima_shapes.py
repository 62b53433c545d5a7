"""Sizes of Anima's models, the real ones and tiny ones, and the shapes of the transformer's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

LATENT_CHANNELS, PATCH_AREA = 16, 4


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of all models. context: also the width of the LLM adapter and of Qwen3."""

    width: int
    head: int
    depth: int
    mlp: int
    adaln_rank: int
    context: int
    adapter_head: int
    adapter_depth: int
    adapter_mlp: int
    qwen_depth: int
    qwen_heads: int
    qwen_kv_heads: int
    qwen_head: int
    qwen_mlp: int
    vae_width: int
    least_t5_vocabulary: int
    least_qwen_vocabulary: int


TINY = Sizes(
    width=64, head=32, depth=2, mlp=256, adaln_rank=16,
    context=32, adapter_head=16, adapter_depth=2, adapter_mlp=128,
    qwen_depth=2, qwen_heads=2, qwen_kv_heads=1, qwen_head=16, qwen_mlp=96,
    vae_width=8, least_t5_vocabulary=0, least_qwen_vocabulary=0,
)  # fmt: skip
REAL = Sizes(
    width=2048, head=128, depth=28, mlp=8192, adaln_rank=256,
    context=1024, adapter_head=64, adapter_depth=6, adapter_mlp=4096,
    qwen_depth=28, qwen_heads=16, qwen_kv_heads=8, qwen_head=128, qwen_mlp=3072,
    vae_width=96, least_t5_vocabulary=32128, least_qwen_vocabulary=151936,
)  # fmt: skip


def transformer_shapes(sizes: Sizes, t5_vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Anima's tensors: the official checkpoint's names with the given sizes."""
    shapes = {
        "x_embedder.proj.1.weight": (sizes.width, (LATENT_CHANNELS + 1) * PATCH_AREA),
        "t_embedder.1.linear_1.weight": (sizes.width, sizes.width),
        "t_embedder.1.linear_2.weight": (3 * sizes.width, sizes.width),
        "t_embedding_norm.weight": (sizes.width,),
        "final_layer.linear.weight": (LATENT_CHANNELS * PATCH_AREA, sizes.width),
        "final_layer.adaln_modulation.1.weight": (sizes.adaln_rank, sizes.width),
        "final_layer.adaln_modulation.2.weight": (2 * sizes.width, sizes.adaln_rank),
        "llm_adapter.embed.weight": (t5_vocabulary, sizes.context),
        "llm_adapter.out_proj.weight": (sizes.context, sizes.context),
        "llm_adapter.out_proj.bias": (sizes.context,),
        "llm_adapter.norm.weight": (sizes.context,),
    }
    for index in range(sizes.depth):
        shapes.update({f"blocks.{index}.{name}": shape for name, shape in _block_shapes(sizes).items()})
    for index in range(sizes.adapter_depth):
        shapes.update(
            {f"llm_adapter.blocks.{index}.{name}": shape for name, shape in _adapter_block_shapes(sizes).items()}
        )
    return shapes


def _block_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    shapes = {"mlp.layer1.weight": (sizes.mlp, sizes.width), "mlp.layer2.weight": (sizes.width, sizes.mlp)}
    for attention, source in (("self_attn", sizes.width), ("cross_attn", sizes.context)):
        shapes |= {f"{attention}.{name}.weight": (sizes.width, sizes.width) for name in ("q_proj", "output_proj")}
        shapes |= {f"{attention}.{name}.weight": (sizes.width, source) for name in ("k_proj", "v_proj")}
        shapes |= {f"{attention}.{name}.weight": (sizes.head,) for name in ("q_norm", "k_norm")}
    for branch in ("self_attn", "cross_attn", "mlp"):
        shapes[f"adaln_modulation_{branch}.1.weight"] = (sizes.adaln_rank, sizes.width)
        shapes[f"adaln_modulation_{branch}.2.weight"] = (3 * sizes.width, sizes.adaln_rank)
    return shapes


def _adapter_block_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.weight": (sizes.context,) for name in ("norm_self_attn", "norm_cross_attn", "norm_mlp")}
    for attention in ("self_attn", "cross_attn"):
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        shapes |= {f"{attention}.{name}.weight": (sizes.context, sizes.context) for name in names}
        shapes |= {f"{attention}.{name}.weight": (sizes.adapter_head,) for name in ("q_norm", "k_norm")}
    shapes |= {"mlp.0.weight": (sizes.adapter_mlp, sizes.context), "mlp.0.bias": (sizes.adapter_mlp,)}
    shapes |= {"mlp.2.weight": (sizes.context, sizes.adapter_mlp), "mlp.2.bias": (sizes.context,)}
    return shapes
