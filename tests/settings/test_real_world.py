"""Configs as people bring them, for Kohya's script, from GUIs and from the old trainer: read as meant, and trained."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from safetensors import safe_open

from anima_train_network import main
from library.settings import read_settings, settings_as_flat_dict
from library.settings.groups import by_spelling, top_level_options
from tests.shipped_configs import small_words_for

FILES = Path(__file__).with_name("real_world")
SETTINGS_FILES = sorted(path.stem for path in FILES.glob("*.toml") if not path.stem.endswith("_dataset"))

# What matters in each: resolved values, apart from paths, sizes and the length, which the tests swap.
EXPECTED = {
    "kohya_flat": {
        "network_module": "networks.lora_anima",
        "network_dim": 16,
        "network_alpha": 8.0,
        "learning_rate": 1e-4,
        "optimizer_type": "adamw",
        "mixed_precision": "bf16",
        "save_precision": "fp16",
        "cache_latents": True,
        "gradient_checkpointing": True,
        "seed": 1234,
        "lr_scheduler": "constant",
        "datasets": [{"batch_size": 4, "enable_bucket": True, "subsets": [{"num_repeats": 1}]}],
    },
    "kohya_headings": {
        "network_module": "networks.lokr_anima",
        "network_dim": 8,
        "network_args": ["factor=4", "train_norm=false"],
        "optimizer_args": ["weight_decay=0.1", "betas=0.9,0.95"],
        "unet_lr": 3e-5,
        "lr_scheduler": "cosine_with_restarts",
        "lr_scheduler_num_cycles": 3.0,
        "lr_warmup_steps": 0.1,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
        "save_every_n_epochs": 2,
        "datasets": [{"batch_size": 2, "bucket_no_upscale": True}],
    },
    "kohya_two_files": {
        "network_dim": 32,
        "network_alpha": 32.0,
        "network_train_unet_only": True,
        "learning_rate": 2e-5,
        "optimizer_args": ["betas=(0.9, 0.99)", "weight_decay=0.01", "eps=1e-8"],
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 1,
        "timestep_sampling": "sigmoid",
        "anima_sigmoid_scale": 1.3,
        "cache_latents_to_disk": True,
        "cache_text_encoder_outputs": True,
        "save_every_n_steps": 250,
        "save_state": True,
        "training_comment": "angelic, v2",
        "datasets": [
            {
                "batch_size": 2,
                "enable_bucket": True,
                "subsets": [{"num_repeats": 2, "keep_tokens": 1, "caption_tag_dropout_rate": 0.1}],
            },
            {
                "batch_size": 4,
                "enable_bucket": False,
                "subsets": [
                    {"shuffle_caption": True, "flip_aug": True, "caption_prefix": "masterpiece, "},
                    {"shuffle_caption": False, "flip_aug": False, "caption_dropout_rate": 0.2},
                ],
            },
        ],
    },
    "kohya_inline_datasets": {
        "network_module": "networks.loha_anima",
        "network_dim": 4,
        "lr_scheduler": "polynomial",
        "lr_scheduler_power": 2.0,
        "mixed_precision": "no",
        "loss_type": "huber",
        "huber_schedule": "constant",
        "huber_c": 0.15,
        "min_timestep": 100,
        "max_timestep": 900,
        "anima_noise_offset": 0.05,
        "datasets": [
            {
                "batch_size": 2,
                "enable_bucket": True,
                "subsets": [
                    {"num_repeats": 2, "shuffle_caption": True, "is_reg": False, "keep_tokens_separator": "|||"},
                    {"num_repeats": 1, "is_reg": True, "class_tokens": "person"},
                ],
            }
        ],
    },
    "gui_full_export": {
        "network_dim": 16,
        "network_alpha": 16.0,
        "network_dropout": 0.0,
        "network_args": [],
        "network_weights": None,
        "scale_weight_norms": None,
        "learning_rate": 1e-4,
        "unet_lr": 1e-4,
        "text_encoder_lr": None,
        "lr_scheduler_num_cycles": 1.0,
        "max_train_epochs": None,
        "max_grad_norm": 1.0,
        "anima_flow_shift": 3.0,
        "loss_type": "l2",
        "save_precision": "fp16",
        "save_every_n_epochs": 1,
        "save_every_n_steps": None,
        "sample_prompts": None,
        "sample_every_n_steps": None,
        "log_with": "tensorboard",
        "resume": None,
        "seed": 0,
        "datasets": [{"batch_size": 1, "bucket_no_upscale": True, "subsets": [{"caption_dropout_rate": 0.0}]}],
    },
    "gui_lycoris": {
        "network_module": "lycoris.kohya",
        "network_dim": 8,
        "network_args": ["algo=lokr", "factor=4", "dropout=0"],
        "network_train_unet_only": True,
        "text_encoder_lr": 1e-5,
        "lr_scheduler": "cosine_with_restarts",
        "save_every_n_epochs": 2,
        "seed": 1337,
        "cache_latents_to_disk": True,
        "datasets": [{"batch_size": 2, "subsets": [{"shuffle_caption": True, "keep_tokens": 0}]}],
    },
    "gui_other_defaults": {
        "learning_rate": 5e-5,
        "unet_lr": None,
        "text_encoder_lr": 0.0,
        "network_dim": 8,
        "network_alpha": 4.0,
        "network_dropout": 0.0,
        "scale_weight_norms": None,
        "max_grad_norm": 1.0,
        "network_args": [],
        "gradient_checkpointing": False,
        "cache_latents": True,
        "mixed_precision": "bf16",
        "seed": 42,
        "logging_dir": "logs",
        "datasets": [{"batch_size": 2, "enable_bucket": True}],
    },
    "root_full": {
        "network_module": "networks.lokr_anima",
        "network_dim": 100000,
        "network_alpha": 100000.0,
        "network_args": [
            "lokr_factor=8",
            "target_modules=q_proj,k_proj,v_proj,output_proj,mlp.layer1,mlp.layer2",
            "lokr_full_matrix=True",
            "lokr_decompose_both=False",
            "lokr_rank_dropout=0.0",
            "lokr_module_dropout=0.0",
        ],
        "learning_rate": 1e-4,
        "optimizer_type": "adamw",
        "optimizer_args": ["weight_decay=0.01", "eps=1e-08", "betas=(0.9,0.95)"],
        "max_grad_norm": 1.0,
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine_with_min_lr",
        "lr_scheduler_min_lr_ratio": 0.1,
        "lr_scheduler_num_cycles": 0.5,
        "lr_warmup_steps": 0.1,
        "log_every_n_steps": 5,
        "output_name": "root_full",
        "save_every_n_steps": 200,
        "save_every_n_epochs": None,
        "save_state": True,
        "resume": None,
        "datasets": [
            {
                "batch_size": 2,
                "enable_bucket": True,
                "subsets": [
                    {
                        "num_repeats": 2,
                        "shuffle_caption": True,
                        "keep_tokens": 1,
                        "flip_aug": True,
                        "caption_tag_dropout_rate": 0.1,
                    }
                ],
            }
        ],
    },
    "root_minimal": {
        "network_module": "networks.lora_anima",
        "network_dim": 32,
        "network_alpha": 16.0,
        "learning_rate": 5e-5,
        "mixed_precision": "bf16",
        "optimizer_type": "AdamW",
        "optimizer_args": ["weight_decay=0.01", "eps=1e-08", "betas=(0.9,0.999)"],
        "lr_scheduler": "constant",
        "gradient_checkpointing": None,
        "seed": 42,
        "output_dir": "output",
        "output_name": "anima_lora",
        "save_state": True,
        "datasets": [{"batch_size": 1, "enable_bucket": True, "subsets": [{"num_repeats": 1, "keep_tokens": 0}]}],
    },
    "root_schedulefree": {
        "network_module": "networks.lora_anima",
        "network_dim": 8,
        "network_args": [],
        "learning_rate": 2e-4,
        "optimizer_type": "RAdamScheduleFree",
        "optimizer_args": ["betas=(0.9,0.999)", "weight_decay=0.0"],
        "gradient_accumulation_steps": 2,
        "train_llm_adapter": False,
        "max_train_epochs": None,
        "save_every_n_epochs": 1,
        "datasets": [{"batch_size": 2, "enable_bucket": True, "subsets": [{"num_repeats": 2}]}],
    },
}

# What is said of each: parts of all its warnings, in order.
WARNINGS = {
    "gui_full_export": ["clip_skip does", "max_token_length does", "noise_offset_type does", "sample_sampler does"],
    "gui_lycoris": ["max_token_length does", "clip_skip does", "persistent_data_loader_workers does nothing"],
    "root_full": [
        "dataset.max_ar is not used: min_reso and max_reso bound the aspect ratio",
        "training.train_parts is not used: the network's own settings say what is trained",
        "training.text_cache_size is not used",
        "training.max_token_length is not used: captions are never cut",
        "lora.lora_name is not used: output.output_name names the files",
        "optimizer.prodigy_d_coef is not used: it is for Prodigy, and the optimizer is adamw",
        "optimizer.prodigy_decouple is not used",
        "optimizer.prodigy_use_bias_correction is not used",
        "optimizer.prodigy_safeguard_warmup is not used",
    ],
    "root_schedulefree": [
        "training.epochs is not used: max_steps is above 0 and wins",
        "lora.lokr_factor is not used: it is for LoKr, and a LoRA is trained",
    ],
}


# Keys of other parts of Kohya's script, tried as soon as they are known.
NOT_YET_KNOWN = (
    "caption_dropout_every_n_epochs", "save_last_n_epochs", "save_last_n_epochs_state", "save_last_n_steps",
    "save_last_n_steps_state", "secondary_separator",
)  # fmt: skip


def words_for(name: str, model: Path, folder: Path) -> list[str]:
    words = ["--config_file", str(FILES / f"{name}.toml")]
    dataset = FILES / f"{name}_dataset.toml"
    if dataset.exists():
        words += ["--dataset_config", str(dataset)]
    small = small_words_for(words, model, folder)
    unknown = {*NOT_YET_KNOWN} - {*by_spelling(top_level_options())}
    for path in map(Path, small[1::2][: len(words) // 2]):
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line for line in lines if line.split(" =")[0] not in unknown), encoding="utf-8")
    return small


def picked(value: object, like: object) -> object:
    """The part of `value` that `like` names, however deep."""
    if isinstance(like, dict):
        return {key: picked(value[key], like[key]) for key in like}
    if isinstance(like, list) and like and isinstance(like[0], dict):
        return [picked(item, other) for item, other in zip(value, like, strict=True)]
    return value


@pytest.mark.parametrize("name", SETTINGS_FILES)
def test_it_is_read_as_meant(name, tiny_anima, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    flat = settings_as_flat_dict(read_settings(words_for(name, tiny_anima, tmp_path)))
    assert picked(flat, EXPECTED[name]) == EXPECTED[name]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    said = [warning for warning in warnings if not warning.startswith("--")]  # the overlay's flags win, and say so
    assert len(said) == len(WARNINGS.get(name, [])), said
    for part, warning in zip(WARNINGS.get(name, []), said, strict=True):
        assert part in warning


@pytest.mark.parametrize("name", SETTINGS_FILES)
def test_it_trains(name, tiny_anima, tmp_path, monkeypatch, losses):
    monkeypatch.chdir(tmp_path)
    words = words_for(name, tiny_anima, tmp_path)
    saving = read_settings(words).saving
    assert main(words) == 0
    assert len(losses) == 2
    with safe_open(saving.output_dir / f"{saving.output_name}.safetensors", "pt") as file:
        assert file.metadata()["ss_network_module"] == EXPECTED[name].get("network_module", "networks.lora_anima")
