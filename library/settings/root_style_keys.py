"""What each key of the root-style single-file form becomes, and the defaults that files of this form rely on."""

from __future__ import annotations

from typing import Any

DEFAULT_SOURCE = "root-style default"

# Keys that no Kohya file has. Headings alone prove nothing: Kohya files may use [model] and [training] too.
SIGNS = frozenset(
    {
        "model.transformer_path",
        "model.vae_path",
        "model.text_encoder_path",
        "lora.network_type",
        "lora.lora_rank",
        "lora.lora_alpha",
        "dataset.data_dir",
    }
)

# Root-style key -> setting with the same value.
SAME_VALUE: dict[str, str] = {
    "model.transformer_path": "pretrained_model_name_or_path",
    "model.vae_path": "vae",
    "model.text_encoder_path": "qwen",
    "model.t5_tokenizer_dir": "t5_tokenizer_dir",
    "model.t5_tokenizer_path": "t5_tokenizer_dir",
    "lora.lora_rank": "network_dim",
    "lora.lora_alpha": "network_alpha",
    "lora.lora_dropout": "network_dropout",
    "training.batch_size": "batch_size",
    "training.grad_accum": "gradient_accumulation_steps",
    "training.grad_checkpoint": "gradient_checkpointing",
    "training.grad_clip": "max_grad_norm",
    "training.num_workers": "max_data_loader_n_workers",
    "training.seq_len": "anima_seq_len",
    "training.noise_offset": "anima_noise_offset",
    "training.log_every": "log_every_n_steps",
    "dataset.data_dir": "train_data_dir",
    "dataset.repeats": "num_repeats",
    "dataset.min_reso": "min_bucket_reso",
    "dataset.max_reso": "max_bucket_reso",
    "dataset.reso_step": "bucket_reso_steps",
    "dataset.flip_augment": "flip_aug",
    "output.save_every": "save_every_n_steps",
}

# Root-style key -> argument "key=value" of a setting that is a list of them. optimizer.prodigy_* follow their prefix.
ARGUMENTS: dict[str, tuple[str, str]] = {
    "lora.lora_targets": ("network_args", "target_modules"),
    "lora.lokr_factor": ("network_args", "lokr_factor"),
    "lora.lokr_full_matrix": ("network_args", "lokr_full_matrix"),
    "lora.lokr_decompose_both": ("network_args", "lokr_decompose_both"),
    "lora.lokr_rank_dropout": ("network_args", "lokr_rank_dropout"),
    "lora.lokr_module_dropout": ("network_args", "lokr_module_dropout"),
    "optimizer.weight_decay": ("optimizer_args", "weight_decay"),
    "optimizer.eps": ("optimizer_args", "eps"),
    "optimizer.betas": ("optimizer_args", "betas"),
}
ARGUMENT_LISTS = ("network_args", "optimizer_args")
PRODIGY_PREFIX = "optimizer.prodigy_"

# Keys whose setting follows from their value or from other keys; the functions of root_style read them.
COMPUTED = frozenset(
    {
        "lora.network_type",
        "lora.lora_name",
        "training.epochs",
        "training.max_steps",
        "training.mixed_precision",
        "training.lr_scheduler",
        "training.lr_min_ratio",
        "training.lr_warmup_steps",
        "training.lr_warmup_ratio",
        "optimizer.type",
        "optimizer.beta1",
        "optimizer.beta2",
        "output.save_state_every",
    }
)

# Known keys, and whole headings, that have no counterpart here, and why. They are listed when they are not off.
WITHOUT_COUNTERPART: dict[str, str] = {
    "training.auto_install": "nothing is installed while training",
    "training.train_parts": "the network's own settings say what is trained",
    "training.text_cache_size": "text_cache_memory_gb says how much text is kept in memory",
    "training.max_token_length": "captions are never cut",
    "lora.lokr_constraint": "LoKr is trained without constraint",
    "lora.lokr_normalize": "LoKr is trained without normalisation",
    "lora.lokr_use_tucker": "Anima has no convolutions to decompose",
    "dataset.max_ar": "min_reso and max_reso bound the aspect ratio",
    "monitor": "losses and memory are watched by this trainer's own settings",
    "wandb": "curves go to TensorBoard",
}

NETWORK_MODULES = {"lora": "networks.lora_anima", "lokr": "networks.lokr_anima"}
OPTIMIZER_NAMES = {"radam_schedulefree": "RAdamScheduleFree"}

# What files of this form rely on where a key is absent, whatever this trainer's own defaults are.
DEFAULTS: dict[str, Any] = {
    "network_module": "networks.lora_anima",
    "network_dim": 32,
    "network_alpha": 16,
    "network_dropout": 0,
    "learning_rate": 5e-5,
    "max_train_epochs": 1,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "mixed_precision": "bf16",
    "max_data_loader_n_workers": 0,
    "seed": 42,
    "anima_seq_len": 512,
    "resolution": 1024,
    "enable_bucket": True,
    "min_bucket_reso": 512,
    "max_bucket_reso": 2048,
    "bucket_reso_steps": 64,
    "num_repeats": 1,
    "shuffle_caption": False,
    "keep_tokens": 0,
    "caption_extension": ".txt",
    "flip_aug": False,
    "optimizer_type": "AdamW",
    "lr_scheduler": "constant",
    "output_dir": "output",
    "output_name": "anima_lora",
    "save_state": True,
}
ADAMW_NAMES = ("adamw", "adamw8bit", "pagedadamw", "pagedadamw8bit")
ADAMW_DEFAULTS = {"weight_decay": 0.01, "eps": 1e-8, "betas": "(0.9,0.999)"}
BETA_DEFAULTS = {"optimizer.beta1": 0.9, "optimizer.beta2": 0.999}
LOKR_DEFAULTS = {"lokr_factor": 8}
