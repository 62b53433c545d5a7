"""The sizes of an Anima transformer, read off the shapes in its file: depth and width differ between variants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from library.errors import ModelFileError

Shapes = Mapping[str, tuple[int, ...]]

# The rotary angles of a head are split 2:1:1 or so over t, h and w; from 12 up each axis gets two frequencies or more.
_SMALLEST_HEAD = 12


@dataclass(frozen=True)
class LLMAdapterConfig:
    """vocabulary: T5 ids; source_width: of the Qwen states; context_width: of the rows it makes."""

    vocabulary: int
    width: int
    depth: int
    head_size: int
    mlp_width: int
    source_width: int
    context_width: int


@dataclass(frozen=True)
class AnimaConfig:
    """patch_size: side of the square of latent pixels in one token; adaln_rank: of the blocks' own modulation."""

    latent_channels: int
    patch_size: int
    width: int
    depth: int
    head_size: int
    mlp_width: int
    context_width: int
    adaln_rank: int
    llm_adapter: LLMAdapterConfig

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> AnimaConfig:
        """Reads the sizes from the shapes of a checkpoint whose names have no prefix.

        Raises ModelFileError naming the tensors that are needed for it and missing, or saying what does not fit.
        """
        _require_tensors(shapes)
        output_features, width = shapes["final_layer.linear.weight"]
        context_width = shapes["blocks.0.cross_attn.k_proj.weight"][1]
        # The input has one channel more than the output: the padding mask.
        patch_area = shapes["x_embedder.proj.1.weight"][1] - output_features
        patch_size = math.isqrt(max(patch_area, 1))
        if patch_size**2 != patch_area or output_features % patch_area:
            raise ModelFileError(
                f"x_embedder.proj.1.weight has {patch_area} inputs more than final_layer.linear.weight has outputs, "
                "which is not the one extra channel of a square patch."
            )
        return cls(
            latent_channels=output_features // patch_area,
            patch_size=patch_size,
            width=width,
            depth=_count_blocks(shapes, "blocks."),
            head_size=_head_size(shapes, "blocks.0.self_attn.q_norm.weight", width),
            mlp_width=shapes["blocks.0.mlp.layer1.weight"][0],
            context_width=context_width,
            adaln_rank=shapes["blocks.0.adaln_modulation_self_attn.1.weight"][0],
            llm_adapter=_llm_adapter_config(shapes, context_width),
        )


def _llm_adapter_config(shapes: Shapes, context_width: int) -> LLMAdapterConfig:
    vocabulary, width = shapes["llm_adapter.embed.weight"]
    return LLMAdapterConfig(
        vocabulary=vocabulary,
        width=width,
        depth=_count_blocks(shapes, "llm_adapter.blocks."),
        head_size=_head_size(shapes, "llm_adapter.blocks.0.self_attn.q_norm.weight", width),
        mlp_width=shapes["llm_adapter.blocks.0.mlp.0.weight"][0],
        source_width=shapes["llm_adapter.blocks.0.cross_attn.k_proj.weight"][1],
        context_width=context_width,
    )


# The tensors that tell the sizes, with their numbers of dimensions.
_TRANSFORMER_TENSORS = {
    "x_embedder.proj.1.weight": 2,
    "final_layer.linear.weight": 2,
    "blocks.0.self_attn.q_norm.weight": 1,
    "blocks.0.mlp.layer1.weight": 2,
    "blocks.0.cross_attn.k_proj.weight": 2,
    "blocks.0.adaln_modulation_self_attn.1.weight": 2,
}
_LLM_ADAPTER_TENSORS = {
    "llm_adapter.embed.weight": 2,
    "llm_adapter.blocks.0.self_attn.q_norm.weight": 1,
    "llm_adapter.blocks.0.mlp.0.weight": 2,
    "llm_adapter.blocks.0.cross_attn.k_proj.weight": 2,
}


def _require_tensors(shapes: Shapes) -> None:
    needed = _TRANSFORMER_TENSORS | _LLM_ADAPTER_TENSORS
    missing = [name for name in needed if name not in shapes]
    if missing == list(_LLM_ADAPTER_TENSORS):
        raise ModelFileError("It has no llm_adapter tensors: it is a Cosmos-Predict2 transformer, not Anima.")
    if missing:
        raise ModelFileError(f"Tensors that tell the model's sizes are missing: {', '.join(missing)}.")
    for name, dimensions in needed.items():
        if len(shapes[name]) != dimensions or 0 in shapes[name]:
            raise ModelFileError(f"{name} has shape {list(shapes[name])}, where {dimensions} sizes are expected.")


def _count_blocks(shapes: Shapes, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _head_size(shapes: Shapes, name: str, width: int) -> int:
    head_size = shapes[name][0]
    if width % head_size or head_size % 2 or head_size < _SMALLEST_HEAD:
        raise ModelFileError(f"{name} gives a head size of {head_size}, which does not fit a width of {width}.")
    return head_size
