"""Settings told by an adapter's metadata: this project's fully, Kohya's as far as they go."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import ModelFileError, SettingError
from library.settings import read_settings, shareable_settings
from tests.settings.test_listing import DATASETS, comparable


def save_adapter(workplace, metadata, name="a.safetensors"):
    save_file({"x": torch.zeros(1)}, workplace / name, metadata)
    return ["--from_adapter", name]


def own_metadata(settings):
    return {"ss_anima_settings": json.dumps(shareable_settings(settings))}


RUN = [
    "--network_args", "a=1", "--optimizer_args", "betas=(0.9,0.99)", "--learning_rate", "3e-5", "--no-train_norm",
    "--max_train_epochs", "3", "--adapter_format", "kohya", "comfy", "--output_name", "é", "--lr_warmup_steps", "0.1",
]  # fmt: skip


@pytest.mark.parametrize("pictures", [["--train_data_dir", "train"], ["--dataset_config", "d.toml"]])
def test_this_projects_adapter_gives_the_same_settings(workplace, model_flags, pictures, caplog):
    (workplace / "d.toml").write_text(DATASETS)
    settings = read_settings([*model_flags, *RUN, *pictures])
    words = save_adapter(workplace, own_metadata(settings))
    caplog.clear()
    assert comparable(read_settings(words)) == comparable(settings)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_file_and_command_line_win_over_the_adapter(workplace, needed_flags):
    words = save_adapter(workplace, own_metadata(read_settings([*needed_flags, "--seed", "1", "--network_dim", "9"])))
    (workplace / "my.toml").write_text("seed = 2\nlearning_rate = 2e-4")
    settings = read_settings([*words, "--config_file", "my.toml", "--learning_rate", "3e-4", "--max_train_steps", "5"])
    assert (settings.network.network_dim, settings.run.seed, settings.run.max_train_steps) == (9, 2, 5)
    assert settings.optimizer.learning_rate == 3e-4
    assert settings.given["network_dim"].source == "a.safetensors"


def test_other_pictures_are_trained_with_the_adapters_data_settings(workplace, needed_flags):
    words = ["--resolution", "64", "96", "--keep_tokens", "2", "--shuffle_caption"]
    adapter = save_adapter(workplace, own_metadata(read_settings([*needed_flags, *words])))
    (dataset,) = read_settings([*adapter, "--train_data_dir", "more"]).datasets
    assert dataset.resolution == (64, 96)
    assert [(str(subset.image_dir), subset.num_repeats) for subset in dataset.subsets] == [("more", 1)]
    assert dataset.subsets[0].keep_tokens == 2


def test_what_is_not_on_this_machine_is_listed(workplace, needed_flags, caplog):
    absolute = [str(workplace / word) if (workplace / word).exists() else word for word in needed_flags]
    words = save_adapter(workplace, own_metadata(read_settings([*absolute, "--seed", "7"])))
    metadata = json.loads(own_metadata(read_settings([*absolute]))["ss_anima_settings"])
    assert metadata["vae"] == "vae.safetensors"
    (workplace / "vae.safetensors").rename(workplace / "other.safetensors")
    (workplace / "train" / "10_cat").rename(workplace / "train" / "cat")
    with pytest.raises(SettingError) as caught:
        read_settings(words)
    assert "no pictures are named" in str(caught.value)
    assert "vae is not set" in str(caught.value)
    assert "vae: it was 'vae.safetensors', which is not here" in caplog.text
    assert "the pictures: set train_data_dir or dataset_config" in caplog.text
    assert "qwen:" not in caplog.text
    settings = read_settings([*words, "--vae", "other.safetensors", "--train_data_dir", "train"])
    assert settings.run.seed == 7


def test_files_of_a_list_that_are_not_on_this_machine_are_listed(workplace, needed_flags, caplog):
    (workplace / "base.safetensors").touch()
    base = ["--base_weights", str(workplace / "base.safetensors")]
    words = save_adapter(workplace, own_metadata(read_settings([*needed_flags, *base])))
    assert read_settings(words).network.base_weights == (Path("base.safetensors"),)
    (workplace / "base.safetensors").unlink()
    assert read_settings(words).network.base_weights == ()
    assert "base_weights: it was ['base.safetensors'], which is not here" in caplog.text


def test_a_setting_of_another_version_is_listed(workplace, needed_flags, caplog):
    metadata = json.loads(own_metadata(read_settings(needed_flags))["ss_anima_settings"]) | {"learning_rat": 3}
    read_settings(save_adapter(workplace, {"ss_anima_settings": json.dumps(metadata)}))
    assert "learning_rat = 3: no setting of this version" in caplog.text


KOHYA = {
    "ss_network_module": "networks.lora_anima",
    "ss_network_dim": "16",
    "ss_network_alpha": "8.0",
    "ss_network_args": '{"conv_dim": "4"}',
    "ss_network_dropout": "None",
    "ss_learning_rate": "0.0003",
    "ss_unet_lr": "1e-05",
    "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.95))",
    "ss_lr_scheduler": "cosine",
    "ss_lr_warmup_steps": "10",
    "ss_gradient_checkpointing": "True",
    "ss_mixed_precision": "bf16",
    "ss_seed": "123",
    "ss_max_train_steps": "400",
    "ss_output_name": "cat",
    "ss_resolution": "(768, 1024)",
    "ss_batch_size_per_device": "2",
    "ss_enable_bucket": "True",
    "ss_keep_tokens": "1",
    "ss_shuffle_caption": "True",
    "ss_min_snr_gamma": "5.0",
    "ss_sd_model_name": "anima.safetensors",
    "ss_base_model_version": "anima",
    "ss_steps": "400",
    "ss_epoch": "3",
    "sshs_model_hash": "ab",
}


def test_kohyas_metadata_gives_what_it_tells(workplace, needed_flags, caplog):
    settings = read_settings([*save_adapter(workplace, KOHYA), *needed_flags])
    network, run, optimizer = settings.network, settings.run, settings.optimizer
    assert (network.network_dim, network.network_alpha, network.network_args) == (16, 8.0, ("conv_dim=4",))
    assert (network.unet_lr, network.text_encoder_lr, network.network_dropout) == (1e-5, None, 0.0)
    assert (optimizer.optimizer_type, optimizer.optimizer_args) == ("AdamW", ("weight_decay=0.1", "betas=(0.9, 0.95)"))
    assert (optimizer.learning_rate, settings.schedule.lr_scheduler, settings.schedule.lr_warmup_steps) == (
        3e-4,
        "cosine",
        10,
    )
    assert (run.mixed_precision, run.seed, run.max_train_steps, run.gradient_checkpointing) == ("bf16", 123, 400, True)
    (dataset,) = settings.datasets
    assert (dataset.resolution, dataset.batch_size, dataset.enable_bucket) == ((768, 1024), 2, True)
    assert (dataset.subsets[0].keep_tokens, dataset.subsets[0].shuffle_caption) == (1, True)
    assert "the model files (called anima.safetensors): set pretrained_model_name_or_path, vae, " in caplog.text
    assert "min_snr_gamma = 5.0: Anima predicts a flow velocity" in caplog.text
    assert "ss_steps" not in caplog.text


def test_an_adapter_for_another_model_is_named(workplace, needed_flags, caplog):
    other = {**KOHYA, "ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0"}
    other["ss_lr_scheduler"] = "of_my_own"
    settings = read_settings([*save_adapter(workplace, other), *needed_flags])
    assert settings.network.network_module == "networks.lora_anima"
    assert "network_module = networks.lora: a network for another model" in caplog.text
    assert "base_model_version = sdxl_base_v1-0: the adapter is for another model" in caplog.text
    assert "lr_scheduler = of_my_own: expected one of" in caplog.text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "tells nothing of its training"),
        ({"modelspec.title": "x"}, "tells nothing of its training"),
        ({"ss_anima_settings": "{"}, "ss_anima_settings is damaged"),
        ({"ss_anima_settings": "[]"}, "ss_anima_settings is damaged"),
        ({"ss_anima_settings": "{}"}, "ss_anima_settings is damaged"),
        ({"ss_anima_settings": '{"datasets": [{}]}'}, "ss_anima_settings is damaged"),
        ({"ss_anima_settings": '{"datasets": 3}'}, "ss_anima_settings is damaged"),
        ({"ss_anima_settings": '{"datasets": [], "seed": "x"}'}, "a.safetensors: seed = 'x': expected a whole number"),
    ],
)
def test_metadata_that_tells_nothing_is_refused(workplace, needed_flags, metadata, message):
    with pytest.raises((ModelFileError, SettingError), match=message):
        read_settings([*save_adapter(workplace, metadata), *needed_flags])


def test_files_that_are_no_adapters_are_refused(workplace, needed_flags):
    for name, message in (("vae.safetensors", "not a whole .safetensors file"), ("no.safetensors", "there is no file")):
        with pytest.raises(ModelFileError, match=message):
            read_settings([*needed_flags, "--from_adapter", name])
