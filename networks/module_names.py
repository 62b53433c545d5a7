"""The names of Anima's modules, in the checkpoint and in diffusers, and the depths that a file's keys tell.

File formats that write dots as underscores can only be read back through such a table: llm_adapter, output_proj and
adaln_modulation_self_attn have underscores of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

TEXT_ENCODER = "text_encoder."
LLM_ADAPTER = "llm_adapter."

_DIFFUSERS_OUTSIDE_BLOCKS = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_DIFFUSERS_IN_BLOCK = {
    **{f"self_attn.{own}": f"attn1.{theirs}" for own, theirs in _ATTENTION.items()},
    **{f"cross_attn.{own}": f"attn2.{theirs}" for own, theirs in _ATTENTION.items()},
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{branch}.{i}": f"norm{number}.linear_{i}"
        for number, branch in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for i in (1, 2)
    },
}
_ADAPTER_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_IN_ADAPTER_BLOCK = (
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in _ADAPTER_ATTENTION),
    *("mlp.0", "mlp.2", "norm_self_attn", "norm_cross_attn", "norm_mlp"),
)
_IN_TEXT_ENCODER_LAYER = (
    *(f"self_attn.{part}" for part in _ADAPTER_ATTENTION),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"),
)
_WITH_BIAS = re.compile(r"llm_adapter\.(blocks\.\d+\.mlp\.[02]|out_proj)")

_BLOCK_NUMBERS = {
    "transformer": re.compile(r"(?<!llm_adapter[._])(?<!text_conditioner[._])blocks[._](\d{1,3})[._]"),
    "llm_adapter": re.compile(r"(?:llm_adapter|text_conditioner)[._]blocks[._](\d{1,3})[._]"),
    "text_encoder": re.compile(r"(?:^|[._])layers[._](\d{1,3})[._]"),
}


def module_names(depth: int, llm_adapter_depth: int = 6, text_encoder_depth: int = 28) -> tuple[str, ...]:
    """Dotted paths of every module with a weight, norms included; Qwen3's own paths stand after "text_encoder."."""
    return (
        *_DIFFUSERS_OUTSIDE_BLOCKS,
        *(f"blocks.{i}.{part}" for i in range(depth) for part in _DIFFUSERS_IN_BLOCK),
        *(f"{LLM_ADAPTER}{part}" for part in ("embed", "out_proj", "norm")),
        *(f"{LLM_ADAPTER}blocks.{i}.{part}" for i in range(llm_adapter_depth) for part in _IN_ADAPTER_BLOCK),
        *(f"{TEXT_ENCODER}{part}" for part in ("embed_tokens", "norm")),
        *(f"{TEXT_ENCODER}layers.{i}.{part}" for i in range(text_encoder_depth) for part in _IN_TEXT_ENCODER_LAYER),
    )


def module_names_covering(keys: Iterable[str]) -> tuple[str, ...]:
    """The module names of an Anima just deep enough for the keys of an adapter file, whatever their format."""
    keys = list(keys)
    return module_names(*(depth_of_keys(keys, part) for part in _BLOCK_NUMBERS))


def depth_of_keys(keys: Iterable[str], part: str = "transformer") -> int:
    """One more than the highest block number in the keys; 0 without any.

    part: "transformer", "llm_adapter" or "text_encoder".
    """
    numbers = [int(match[1]) for key in keys if (match := _BLOCK_NUMBERS[part].search(key))]
    return max(numbers, default=-1) + 1


def diffusers_name(path: str) -> str:
    """The module's name in diffusers' CosmosTransformer3DModel, or in its AnimaTextConditioner after that prefix."""
    if path.startswith(LLM_ADAPTER):
        return "text_conditioner." + path.removeprefix(LLM_ADAPTER)
    if path.startswith("blocks."):
        _, number, part = path.split(".", 2)
        return f"transformer_blocks.{number}.{_DIFFUSERS_IN_BLOCK.get(part, part)}"
    return _DIFFUSERS_OUTSIDE_BLOCKS.get(path, path)


def has_bias(path: str) -> bool:
    """Whether the module has a bias in Anima: only the LLM adapter's MLPs and its out_proj do."""
    return _WITH_BIAS.fullmatch(path) is not None
