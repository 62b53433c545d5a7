from __future__ import annotations

import pytest

from library.anima_runtime.file_kinds import describe_tensors

EXAMPLES = [
    ("an adapter file (LoRA)", ["diffusion_model.blocks.0.self_attn.q_proj.lora_down.weight"]),
    ("an adapter file (LoRA)", ["base_model.model.blocks.0.self_attn.q_proj.lora_A.default.weight"]),
    ("an adapter file (LoKr)", ["lora_unet_blocks_0_mlp_layer1.lokr_w1", "lora_unet_blocks_0_mlp_layer1.lokr_w2"]),
    ("an adapter file (LoHa)", ["lycoris_blocks_0_mlp_layer1.hada_w1_a"]),
    ("an Anima transformer", ["net.blocks.0.adaln_modulation_self_attn.1.weight", "net.llm_adapter.embed.weight"]),
    (
        "a Cosmos-Predict2 transformer without Anima's LLM adapter",
        ["net.blocks.0.adaln_modulation_self_attn.1.weight", "net.x_embedder.proj.1.weight"],
    ),
    (
        "a Cosmos transformer with diffusers names",
        ["patch_embed.proj.weight", "transformer_blocks.0.norm1.linear_1.weight"],
    ),
    ("a Qwen-Image VAE with the original (Wan) names", ["encoder.conv1.weight", "decoder.head.0.gamma"]),
    ("a Qwen-Image VAE with diffusers names", ["encoder.conv_in.weight", "decoder.norm_out.gamma"]),
    ("a Stable Diffusion or Flux VAE with diffusers names", ["encoder.conv_in.bias", "decoder.conv_norm_out.bias"]),
    (
        "a full Stable Diffusion checkpoint",
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.down.0.block.0.norm1.bias"],
    ),
    (
        "a Qwen3 language model",
        ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_norm.weight", "model.embed_tokens.weight"],
    ),
    ("a language model other than Qwen3", ["layers.0.mlp.gate_proj.weight", "layers.0.self_attn.q_proj.weight"]),
    ("a T5 text encoder", ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"]),
    ("a Flux transformer", ["double_blocks.0.img_attn.qkv.weight"]),
]


@pytest.mark.parametrize(("kind", "names"), EXAMPLES)
def test_a_known_file_is_called_by_its_name(kind, names):
    assert describe_tensors(names) == kind


def test_an_unknown_file_is_described_by_its_first_names():
    assert describe_tensors(["c", "a", "d", "b"]) == "an unknown kind of file, with tensors such as a, b, c"
    assert describe_tensors([]) == "a file without tensors"
