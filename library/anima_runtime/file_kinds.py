"""What a model file looks like, judged by its tensors' names: so that a wrong file can be called by its name."""

from __future__ import annotations

from collections.abc import Collection

# The first kind wins whose fragments all occur, each at the start of a name or after a dot.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("an adapter file (LoRA)", ("lora_down.weight",)),
    ("an adapter file (LoRA)", ("lora_A.",)),
    ("an adapter file (LoKr)", ("lokr_w",)),
    ("an adapter file (LoHa)", ("hada_w",)),
    ("an Anima transformer", ("blocks.0.adaln_modulation_self_attn.", "llm_adapter.")),
    ("a Cosmos-Predict2 transformer without Anima's LLM adapter", ("blocks.0.adaln_modulation_self_attn.",)),
    ("a Cosmos transformer with diffusers names", ("transformer_blocks.0.norm1.linear_1.", "patch_embed.proj.")),
    ("Anima's LLM adapter alone", ("blocks.0.norm_cross_attn.", "out_proj.")),
    ("a Qwen-Image VAE with the original (Wan) names", ("encoder.conv1.", "decoder.head.0.gamma")),
    ("a Qwen-Image VAE with diffusers names", ("encoder.conv_in.", "decoder.norm_out.gamma")),
    ("a Stable Diffusion or Flux VAE with diffusers names", ("encoder.conv_in.", "decoder.conv_norm_out.")),
    ("a full Stable Diffusion checkpoint", ("first_stage_model.", "model.diffusion_model.input_blocks.")),
    ("a Stable Diffusion or Flux VAE", ("encoder.down.0.block.0.",)),
    ("a Stable Diffusion UNet", ("input_blocks.0.0.",)),
    ("a Stable Diffusion UNet with diffusers names", ("down_blocks.0.resnets.0.", "time_embedding.")),
    ("a Flux transformer", ("double_blocks.0.img_attn.",)),
    ("a Stable Diffusion 3 transformer", ("joint_blocks.0.",)),
    ("a Qwen-Image transformer", ("transformer_blocks.0.attn.add_q_proj.", "txt_norm.")),
    ("a Wan transformer", ("blocks.0.ffn.0.", "blocks.0.self_attn.norm_q.")),
    ("a Qwen vision-language model", ("layers.0.mlp.gate_proj.", "visual.")),
    ("a Qwen3 language model", ("layers.0.mlp.gate_proj.", "layers.0.self_attn.q_norm.")),
    ("a language model other than Qwen3", ("layers.0.mlp.gate_proj.",)),
    ("a T5 text encoder", ("encoder.block.0.layer.0.SelfAttention.",)),
    ("a CLIP text encoder", ("text_model.encoder.layers.0.",)),
)


def describe_tensors(names: Collection[str]) -> str:
    """A phrase for the file that holds tensors of these names, such as "a Qwen3 language model".

    A name is recognised behind any prefix. An unknown kind is described by its first three names.
    """
    lines = "".join(f".{name}\n" for name in names)
    for kind, fragments in _KINDS:
        if all(f".{fragment}" in lines for fragment in fragments):
            return kind
    if not names:
        return "a file without tensors"
    return f"an unknown kind of file, with tensors such as {', '.join(sorted(names)[:3])}"
