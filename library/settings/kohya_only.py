"""Kohya settings that config files carry for other models, or that ask for what happens here anyway."""

from __future__ import annotations

from typing import Any

_FLOW = "Anima predicts a flow velocity and has no noise schedule"
_NEVER_CUT = "captions are never cut"
_NO_CLIP = "Anima has no CLIP text encoder"
_NO_DDP = "gradients are summed over the GPUs in one exchange, without DDP"
_MESSAGES = "messages go to the terminal; redirect them with 2> FILE"
_INDUCTOR = "torch_compile says whether the model is compiled, and how is chosen for it"
_OFFLOADED = "cpu_offload_checkpointing says whether what gradient checkpointing keeps waits in main memory"
_NO_DEEPSPEED = "the frozen model is small enough for every GPU; start several with accelerate launch --multi_gpu"
_RATES = "give rates by pattern in network_args, see docs/adapters.md"
_FULL = "it is for training whole models; adapters have unet_lr, llm_adapter_lr and text_encoder_lr"

# Accepted with a warning that they do nothing, and why.
NO_EFFECT: dict[str, str] = {
    "v2": "Anima is not Stable Diffusion 2",
    "v_parameterization": _FLOW,
    "zero_terminal_snr": _FLOW,
    "scale_v_pred_loss_like_noise_pred": _FLOW,
    "v_pred_like_loss": _FLOW,
    "debiased_estimation_loss": _FLOW,
    "min_snr_gamma": _FLOW,
    "noise_offset_type": "anima_noise_offset and multires_noise_iterations each act where they are set",
    "adaptive_noise_scale": _FLOW,
    "clip_skip": _NO_CLIP,
    "clip_l": _NO_CLIP,
    "clip_g": _NO_CLIP,
    "t5xxl": "of T5, Anima uses the tokenizer only: t5_tokenizer_dir",
    "apply_t5_attn_mask": "padding is always left out of attention",
    "guidance_scale": "Anima takes no guidance as input",
    "max_token_length": _NEVER_CUT,
    "t5xxl_max_token_length": _NEVER_CUT,
    "qwen3_max_token_length": _NEVER_CUT,
    "t5_max_token_length": _NEVER_CUT,
    "weighted_captions": "Anima's text encoders take no word weights",
    "vae_chunk_size": "the VAE encodes whole pictures",
    "vae_disable_cache": "the VAE keeps nothing between pictures",
    "split_attn": "every backend of anima_attention_backend takes a whole batch at once",
    "lowram": "models are read straight onto the GPU, part by part",
    "highvram": "models stay where they are needed, whatever the card's memory",
    "split_mode": "the whole model is trained at once",
    "text_encoder_batch_size": "captions are encoded as they are met",
    "tokenizer_cache_dir": "tokenizers lie in t5_tokenizer_dir and beside qwen",
    "dynamo_backend": _INDUCTOR,
    "dynamo_mode": _INDUCTOR,
    "dynamo_use_fullgraph": _INDUCTOR,
    "dynamo_use_dynamic": _INDUCTOR,
    "unsloth_offload_checkpointing": _OFFLOADED,
    "fused_backward_pass": "an adapter's gradients are small",
    "ddp_timeout": "processes wait up to six hours for each other",
    "ddp_gradient_as_bucket_view": _NO_DDP,
    "ddp_static_graph": _NO_DDP,
    "disable_mmap_load_safetensors": "files are read the same way on every machine",
    "console_log_level": _MESSAGES,
    "console_log_file": _MESSAGES,
    "console_log_simple": _MESSAGES,
    "metadata_thumbnail": "metadata holds no pictures",
    "metadata_merged_from": "a trained adapter is not merged from others",
    "metadata_preprocessor": "it is for control models",
    "metadata_is_negative_embedding": "it is for embeddings",
    "cache_info": "pictures are looked at anew at each start, which takes seconds",
    "custom_attributes": "it is for scripts that read it",
}

# Accepted at these values only, which is what happens here anyway; any other value is refused.
FIXED: dict[str, tuple[Any, ...]] = {
    "save_model_as": ("safetensors",),
    "model_prediction_type": ("raw",),
    "network_multiplier": (1, 1.0),
}

# Refused unless off (see `is_off`), with what to do instead.
REFUSED: dict[str, str] = {
    "config": "a settings file is named by config_file",
    "use_8bit_adam": 'set optimizer_type = "AdamW8bit"',
    "use_lion_optimizer": 'set optimizer_type = "Lion"',
    "optimizer_schedulefree_wrapper": 'set optimizer_type to a schedule-free one, such as "AdamWScheduleFree"',
    "schedulefree_wrapper_args": "remove it with optimizer_schedulefree_wrapper",
    "fused_optimizer_groups": _FULL,
    "learning_rate_te": _FULL,
    "learning_rate_te1": _FULL,
    "learning_rate_te2": _FULL,
    "train_text_encoder": 'write network_args = ["train_text_encoder=true"]',
    "train_t5xxl": 'Anima has no T5 model; Qwen3 is trained by network_args = ["train_text_encoder=true"]',
    "stop_text_encoder_training": "set text_encoder_lr, or leave Qwen3 untrained, which is the default",
    "network_train_text_encoder_only": "leave Anima's Linears out by network_args, see docs/adapters.md",
    "self_attn_lr": _RATES,
    "cross_attn_lr": _RATES,
    "mlp_lr": _RATES,
    "mod_lr": _RATES,
    "block_lr": _RATES,
    "llm_adapter_path": "the LLM adapter is read from the transformer's own file; remove it",
    "ae": "name the VAE by vae",
    "training_shift": "set anima_flow_shift",
    "dataset_class": "name the pictures by dataset_config or train_data_dir",
    "skip_image_resolution": "small pictures are trained; set bucket_no_upscale so that they are not enlarged",
    "debug_dataset": "the table of buckets at the start of a run shows what the pictures became",
    "deepspeed": _NO_DEEPSPEED,
    "zero_stage": _NO_DEEPSPEED,
    "offload_optimizer_device": _NO_DEEPSPEED,
    "offload_optimizer_nvme_path": _NO_DEEPSPEED,
    "offload_param_device": _NO_DEEPSPEED,
    "offload_param_nvme_path": _NO_DEEPSPEED,
    "zero3_init_flag": _NO_DEEPSPEED,
    "zero3_save_16bit_model": _NO_DEEPSPEED,
    "fp16_master_weights_and_gradients": _NO_DEEPSPEED,
}


def is_fixed_value(name: str, value: Any) -> bool:
    """Whether a value, from TOML or as text from the command line, is one that FIXED allows."""
    return any(str(value).lower() == str(allowed).lower() for allowed in FIXED[name])


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing: false, 0, an empty text or list, "no", "none"."""
    return not value or str(value).strip().lower() in ("false", "0", "0.0", "no", "none")
