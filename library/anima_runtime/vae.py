"""The Qwen-Image (Wan 2.1) VAE: reading its file, and pixels to normalised latents and back."""

from __future__ import annotations

import re

from diffusers import AutoencoderKLQwenImage

# diffusers' names -> the original (Wan) ones, applied in order. The decoder's blocks are counted in one row in the
# original: see `_original_name`.
_ORIGINAL_SPELLING = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"coder\.conv_in\.", "coder.conv1."),
    (r"coder\.norm_out\.", "coder.head.0."),
    (r"coder\.conv_out\.", "coder.head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"\.norm1\.", ".residual.0."),
    (r"\.(\d+)\.conv1\.", r".\1.residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.(\d+)\.conv2\.", r".\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)


def original_vae_names(vae: AutoencoderKLQwenImage) -> dict[str, str]:
    """Every tensor of `vae` by diffusers' name -> its name in the original (Wan) file; one-to-one."""
    residual_blocks = vae.config.num_res_blocks
    return {name: _original_name(name, residual_blocks) for name in vae.state_dict()}


def _original_name(name: str, residual_blocks: int) -> str:
    """A level of the decoder is `residual_blocks` + 1 residual blocks and an upsampler, counted on from level to level."""

    def index_in_row(match: re.Match[str]) -> str:
        level, kind, index = int(match[1]), match[2], int(match[3])
        place = index if kind == "resnets" else residual_blocks + 1
        return f"decoder.upsamples.{level * (residual_blocks + 2) + place}."

    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", index_in_row, name)
    for pattern, replacement in _ORIGINAL_SPELLING:
        name = re.sub(pattern, replacement, name)
    return name
