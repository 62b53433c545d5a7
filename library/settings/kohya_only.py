"""Kohya settings that config files carry for other models, or that ask for what happens here anyway."""

from __future__ import annotations

from typing import Any

_FLOW = "Anima predicts a flow velocity and has no noise schedule"
_ATTENTION = "attention runs through torch's scaled_dot_product_attention"

# Accepted with a warning that they do nothing, and why.
NO_EFFECT: dict[str, str] = {
    "v2": "Anima is not Stable Diffusion 2",
    "v_parameterization": _FLOW,
    "zero_terminal_snr": _FLOW,
    "scale_v_pred_loss_like_noise_pred": _FLOW,
    "v_pred_like_loss": _FLOW,
    "debiased_estimation_loss": _FLOW,
    "min_snr_gamma": _FLOW,
    "clip_skip": "Anima has no CLIP text encoder",
    "max_token_length": "captions are never cut",
    "weighted_captions": "Anima's text encoders take no word weights",
    "no_half_vae": "the VAE needs no such protection",
    "xformers": _ATTENTION,
    "mem_eff_attn": _ATTENTION,
}

# Accepted at these values only, which is what happens here anyway; any other value is refused.
FIXED: dict[str, tuple[Any, ...]] = {
    "save_model_as": ("safetensors",),
    "sdpa": (True, False),
    "full_bf16": (False,),
    "full_fp16": (False,),
    "fp8_base": (False,),
    "torch_compile": (False,),
    "blocks_to_swap": (0,),
    "cache_latents_to_disk": (False,),
    "cache_text_encoder_outputs_to_disk": (False,),
    "loss_type": ("l2",),
    "anima_noise_offset": (0, 0.0),
    "noise_offset": (0, 0.0),
    "is_reg": (False,),
    "color_aug": (False,),
    "random_crop": (False,),
    "alpha_mask": (False,),
    "enable_wildcard": (False,),
}


def is_fixed_value(name: str, value: Any) -> bool:
    """Whether a value, from TOML or as text from the command line, is one that FIXED allows."""
    return any(str(value).lower() == str(allowed).lower() for allowed in FIXED[name])
