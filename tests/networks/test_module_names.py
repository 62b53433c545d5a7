"""The tables of module names, against the models themselves."""

import pytest
import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_anima_lora_to_diffusers
from transformers import Qwen3Config, Qwen3Model

from library.anima_runtime.config import AnimaConfig, LLMAdapterConfig
from library.anima_runtime.transformer import AnimaTransformer
from networks.module_names import depth_of_keys, diffusers_name, has_bias, module_names, module_names_covering


def anima(depth: int, adapter_depth: int) -> AnimaTransformer:
    adapter = LLMAdapterConfig(
        vocabulary=64, width=32, depth=adapter_depth, head_size=16, mlp_width=48, source_width=24, context_width=32
    )
    config = AnimaConfig(
        latent_channels=16, patch_size=2, width=64, depth=depth, head_size=32, mlp_width=128, context_width=32,
        adaln_rank=8, llm_adapter=adapter,
    )  # fmt: skip
    with torch.device("meta"):
        return AnimaTransformer(config)


def qwen(depth: int) -> Qwen3Model:
    config = Qwen3Config(
        hidden_size=32, num_hidden_layers=depth, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, vocab_size=32,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen3Model(config)


def weighted(model: torch.nn.Module) -> set[str]:
    return {name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith(".weight")}


@pytest.mark.parametrize(("depth", "adapter_depth", "text_depth"), [(2, 1, 1), (28, 6, 28), (40, 6, 28)])
def test_the_names_are_those_of_the_models(depth, adapter_depth, text_depth):
    expected = weighted(anima(depth, adapter_depth)) | {f"text_encoder.{name}" for name in weighted(qwen(text_depth))}
    names = module_names(depth, adapter_depth, text_depth)
    assert len(names) == len(set(names))
    assert set(names) == expected


def test_the_modules_with_a_bias_are_those_of_the_model():
    biased = {name.removesuffix(".bias") for name, _ in anima(2, 2).named_parameters() if name.endswith(".bias")}
    assert {name for name in module_names(2, 2, 2) if has_bias(name)} == biased


def test_diffusers_names_are_those_of_its_models():
    with torch.device("meta"):
        transformer = CosmosTransformer3DModel(
            in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=32, num_layers=2, mlp_ratio=2.0,
            text_embed_dim=32, adaln_lora_dim=8, max_size=(4, 8, 8), patch_size=(1, 2, 2), concat_padding_mask=True,
            extra_pos_embed_type=None,
        )  # fmt: skip
        conditioner = AnimaTextConditioner()
    adapter_depth = len(conditioner.blocks)
    expected = weighted(transformer) | {f"text_conditioner.{name}" for name in weighted(conditioner)}
    own = [name for name in module_names(2, adapter_depth, 0) if not name.startswith("text_encoder.")]
    assert {diffusers_name(name) for name in own} == expected


def test_diffusers_converts_our_lora_keys_to_the_same_names():
    linears = [name for name, module in anima(2, 1).named_modules() if isinstance(module, torch.nn.Linear)]
    ours = {f"diffusion_model.{name}.lora_A.weight": name for name in linears}
    theirs = _convert_non_diffusers_anima_lora_to_diffusers(ours)
    for key, path in theirs.items():
        expected = diffusers_name(path)
        prefix = "" if expected.startswith("text_conditioner.") else "transformer."
        assert key == f"{prefix}{expected}.lora_A.weight"


@pytest.mark.parametrize(
    ("key", "depths"),
    [
        ("diffusion_model.blocks.39.mlp.layer1.alpha", (40, 0, 0)),
        ("lora_unet_blocks_27_self_attn_q_proj.alpha", (28, 0, 0)),
        ("transformer.transformer_blocks.5.attn1.to_q.lora_A.weight", (6, 0, 0)),
        ("lora_unet_llm_adapter_blocks_3_mlp_0.alpha", (0, 4, 0)),
        ("text_conditioner.blocks.5.mlp.0.lora_A.weight", (0, 6, 0)),
        ("text_encoders.qwen3_06b.transformer.model.layers.27.mlp.up_proj.alpha", (0, 0, 28)),
        ("lora_te_layers_11_mlp_up_proj.alpha", (0, 0, 12)),
        ("diffusion_model.final_layer.linear.alpha", (0, 0, 0)),
    ],
)
def test_depths_are_told_from_keys_of_any_format(key, depths):
    assert tuple(depth_of_keys([key], part) for part in ("transformer", "llm_adapter", "text_encoder")) == depths
    assert len(module_names_covering([key])) == len(module_names(*depths))
