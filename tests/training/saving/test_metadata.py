"""What an adapter says about its making, key by key."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path, PureWindowsPath

import torch
from safetensors.torch import save

from library.data.settings import DatasetSettings, SubsetSettings
from library.data.summary import describe_data
from library.settings import Settings, read_settings, settings_as_flat_dict, shareable_settings
from library.settings.groups import top_level_options
from library.training.saving.metadata import RunFacts, adapter_metadata, shareable_path

STARTED, FINISHED = 1700000000.25, 1700003600.5


def read(tmp_path: Path, *words: str) -> Settings:
    for name in ("anima.safetensors", "vae.safetensors", "qwen.safetensors"):
        (tmp_path / name).touch()
    for name in ("t5", "train/10_cat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train/10_cat/a.png").touch()
    paths = {
        "pretrained_model_name_or_path": "anima.safetensors",
        "vae": "vae.safetensors",
        "qwen": "qwen.safetensors",
        "t5_tokenizer_dir": "t5",
        "train_data_dir": "train",
        "output_dir": "out",
        "logging_dir": "logs",
    }
    path_words = [word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path))]
    return read_settings([*path_words, "--resolution", "832,1216", *words])


def facts(**changed) -> RunFacts:
    subset = SubsetSettings(image_dir=Path("train/10_cat"))
    known = {
        "model": {"ss_base_model_version": "anima", "modelspec.architecture": "anima/lora"},
        "model_files": {"sd_model": Path("/models/anima.safetensors"), "vae": Path("/models/vae.safetensors")},
        "file_hashes": {"sd_model_hash": "01234567", "vae_hash": "89abcdef"},
        "data": describe_data([DatasetSettings(resolution=(832, 1216), batch_size=2, subsets=(subset,))], []),
        "network_args": {"target_modules": "self_attn.q_proj", "train_llm_adapter": "true"},
        "num_batches_per_epoch": 6,
        "num_epochs": 4,
        "max_train_steps": 24,
        "num_processes": 2,
        "started_at": STARTED,
    }
    return RunFacts(**{**known, **changed})


def written(settings: Settings, known: RunFacts) -> dict[str, str]:
    return adapter_metadata(shareable_settings(settings), known, 12, 2, FINISHED)


def test_every_key_and_value(tmp_path):
    settings = read(
        tmp_path, "--optimizer_args", "weight_decay=0.1", "betas=(0.9, 0.99)", "--gradient_accumulation_steps", "3",
        "--output_name", "cat", "--seed", "7", "--learning_rate", "1e-4", "--unet_lr", "2e-4",
        "--text_encoder_lr", "1e-5", "--scale_weight_norms", "0.5",
    )  # fmt: skip
    told = written(settings, facts(session_id=5, commit_hash="abc"))
    data_keys = {key for key in told if key[3:] in facts().data}
    assert json.loads(told.pop("ss_anima_settings"))["output_name"] == "cat"
    assert {key: value for key, value in told.items() if key not in data_keys} == {
        "ss_network_module": "networks.lora_anima",
        "ss_network_dim": "4",
        "ss_network_alpha": "1.0",
        "ss_network_dropout": "0.0",
        "ss_network_args": '{"target_modules": "self_attn.q_proj", "train_llm_adapter": "true"}',
        "ss_scale_weight_norms": "0.5",
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "0.0002",
        "ss_text_encoder_lr": "1e-05",
        "ss_optimizer": "AdamW(weight_decay=0.1,betas=(0.9, 0.99))",
        "ss_lr_scheduler": "constant",
        "ss_lr_warmup_steps": "0",
        "ss_gradient_accumulation_steps": "3",
        "ss_max_grad_norm": "1.0",
        "ss_mixed_precision": "no",
        "ss_full_bf16": "False",
        "ss_full_fp16": "False",
        "ss_seed": "7",
        "ss_output_name": "cat",
        "ss_training_comment": "None",
        "ss_weighting_scheme": "none",
        "ss_logit_mean": "0.0",
        "ss_logit_std": "1.0",
        "ss_mode_scale": "1.29",
        "ss_min_timestep": "0",
        "ss_max_timestep": "1000",
        "ss_noise_offset_random_strength": "False",
        "ss_multires_noise_iterations": "0",
        "ss_multires_noise_discount": "0.3",
        "ss_ip_noise_gamma": "0.0",
        "ss_ip_noise_gamma_random_strength": "False",
        "ss_loss_type": "l2",
        "ss_huber_schedule": "snr",
        "ss_huber_c": "0.1",
        "ss_huber_scale": "1.0",
        "ss_total_batch_size": "12",
        "ss_base_model_version": "anima",
        "ss_sd_model_name": "anima.safetensors",
        "ss_sd_model_hash": "01234567",
        "ss_vae_name": "vae.safetensors",
        "ss_vae_hash": "89abcdef",
        "ss_num_batches_per_epoch": "6",
        "ss_num_epochs": "4",
        "ss_max_train_steps": "24",
        "ss_steps": "12",
        "ss_epoch": "2",
        "ss_session_id": "5",
        "ss_sd_scripts_commit_hash": "abc",
        "ss_training_started_at": "1700000000.25",
        "ss_training_finished_at": "1700003600.5",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "anima/lora",
        "modelspec.title": "cat",
        "modelspec.resolution": "832x1216",
        "modelspec.date": "2023-11-14T23:13:20+00:00",
        "modelspec.hash_sha256": "0x" + 64 * "0",
        "sshs_model_hash": 64 * "0",
        "sshs_legacy_hash": 8 * "0",
    }
    assert told["ss_resolution"] == "(832, 1216)"
    assert (told["ss_batch_size_per_device"], told["ss_enable_bucket"]) == ("2", "False")
    assert json.loads(told["ss_dataset_dirs"]) == {"10_cat": {"n_repeats": 1, "img_count": 0}}
    assert json.loads(told["ss_datasets"])[0]["resolution"] == [832, 1216]
    assert json.loads(told["ss_bucket_info"])["buckets"] == {}
    assert json.loads(told["ss_tag_frequency"]) == {}


def test_the_users_words_stand_in_the_modelspec(tmp_path):
    names = ("author", "description", "license", "tags", "trigger_phrase", "usage_hint")
    words = [word for name in ("title", *names) for word in (f"--metadata_{name}", f"my {name}")]
    told = written(read(tmp_path, *words), facts())
    assert told["modelspec.title"] == "my title"
    assert [told[f"modelspec.{name}"] for name in names] == [f"my {name}" for name in names]


def test_settings_of_a_run_are_whole_but_tell_no_folders_of_the_machine(tmp_path):
    settings = read(tmp_path)
    told = written(settings, facts())
    assert str(tmp_path) not in json.dumps(told)
    held = json.loads(told["ss_anima_settings"])
    assert held.keys() == settings_as_flat_dict(settings).keys()
    assert (held["vae"], held["output_dir"], held["resume"]) == ("vae.safetensors", "out", None)
    assert held["datasets"][0]["subsets"][0]["image_dir"] == "10_cat"
    assert held["datasets"][0]["subsets"][0]["num_repeats"] == 10


def test_lists_and_arguments_tell_no_folders_either(tmp_path):
    base, preset = tmp_path / "base.safetensors", tmp_path / "my_preset.toml"
    base.touch()
    settings = read(
        tmp_path, "--base_weights", str(base), "--network_module", "lycoris.kohya",
        "--network_args", f"preset={preset}", "algo=lokr", "rule=a=/b", "--no-train_norm",
    )  # fmt: skip
    arguments = {"preset": str(preset), "algo": "lokr", "rule": "a=/b"}
    told = written(settings, facts(network_args=arguments))
    assert str(tmp_path) not in json.dumps(told)
    held = json.loads(told["ss_anima_settings"])
    assert held["base_weights"] == ["base.safetensors"]
    assert held["network_args"] == ["preset=my_preset.toml", "algo=lokr", "rule=a=/b"]
    assert json.loads(told["ss_network_args"]) == {"preset": "my_preset.toml", "algo": "lokr", "rule": "a=/b"}


def test_paths_for_others():
    assert shareable_path(Path("train/10_cat")) == "train/10_cat"
    assert shareable_path(Path("/home/alice/train/10_cat")) == "10_cat"
    assert shareable_path(PureWindowsPath(r"C:\Users\alice\10_cat")) == "10_cat"
    assert shareable_path(PureWindowsPath(r"\data\10_cat")) == "10_cat"
    assert shareable_path(PureWindowsPath(r"train\10_cat")) == "train/10_cat"


def test_every_setting_that_is_a_secret_is_declared_as_one():
    """All settings are written into a file that gets shared: what is a key or password is declared as a Secret."""
    secret = re.compile(r"(api_key|_token|password|secret)$")
    named = {name for name in top_level_options() if secret.search(name)}
    assert named == {name for name, option in top_level_options().items() if "Secret" in str(option.type)}


def test_file_names_that_are_not_unicode_can_be_saved(tmp_path):
    odd = "è\udcff.safetensors"  # what Python makes of the bytes C3 A8 FF
    told = written(read(tmp_path), facts(model_files={"sd_model": Path(odd)}, network_args={"a": odd}))
    assert told["ss_sd_model_name"] == "è?.safetensors"
    assert json.loads(told["ss_network_args"]) == {"a": odd}
    save({"a": torch.zeros(1)}, told)


def test_runs_are_told_apart_and_the_program_is_named():
    first, second = facts(), facts()
    assert first.session_id != second.session_id
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert first.commit_hash == (git.stdout.strip() if git.returncode == 0 else "(unknown)")
