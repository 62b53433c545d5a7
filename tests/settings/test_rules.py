import logging

import pytest

from library.errors import SettingError
from library.settings import read_settings
from library.settings.groups import by_spelling, top_level_options
from library.settings.rules import RANGES


def error_of(words):
    with pytest.raises(SettingError) as caught:
        read_settings(words)
    return str(caught.value)


def test_missing_models_are_told_together():
    message = error_of(["--train_data_dir", "nowhere"])
    for name in ("pretrained_model_name_or_path", "vae", "qwen"):
        assert f"{name} is not set: give the path of" in message


def test_model_paths_that_do_not_fit(workplace):
    words = ["--anima_transformer", "t5", "--vae", "no.safetensors", "--qwen", "qwen.safetensors"]
    lines = error_of([*words, "--t5_tokenizer_path", "vae.safetensors", "--train_data_dir", "train"]).splitlines()
    assert lines == [
        "command line: --anima_transformer: t5 is a folder; give the Anima transformer's .safetensors file",
        "command line: --vae: no.safetensors does not exist; give the path of the Qwen-Image VAE",
        "command line: --t5_tokenizer_path: vae.safetensors is a file; give the folder of the tokenizer",
    ]


def below_and_above():
    options = by_spelling(top_level_options())
    for name, (least, greatest) in RANGES.items():
        below = least - 1
        yield name, -1 if below == 0 and options[name].zero_is_unset else below
        if greatest is not None:
            yield name, greatest + 1


@pytest.mark.parametrize(("name", "value"), list(below_and_above()))
def test_numbers_out_of_range(needed_flags, name, value):
    words = [*needed_flags, "--train_data_dir", "more", f"--{name}={value}"]
    assert f"command line: --{name}: {value}" in error_of(words)


def test_every_number_has_a_range_or_needs_none():
    numbers = {
        option.name
        for option in by_spelling(top_level_options()).values()
        if ("int" in str(option.type) or "float" in str(option.type))
        and option.name not in ("resolution", "resolutions", "face_crop_aug_range")
    }
    assert numbers - RANGES.keys() == {"base_weights_multiplier"}


def test_bucket_limits(needed_flags):
    words = ["--bucket_reso_steps", "40", "--min_bucket_reso", "512", "--max_bucket_reso", "256"]
    message = error_of([*needed_flags, *words])
    assert "--bucket_reso_steps: 40 is not a multiple of 16" in message
    assert "--min_bucket_reso is 512, above command line: --max_bucket_reso, which is 256" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer_type", "Adamm"], "command line: --optimizer_type: 'Adamm' is not known"),
        (["--optimizer_args", "weight_decai=1"], "command line: --optimizer_args: AdamW takes no 'weight_decai'"),
        (["--network_weights", "no.safetensors"], "--network_weights: there is no file no.safetensors"),
        (["--resume", "no-state"], "--resume: there is no folder no-state"),
        (["--resume", "train"], "--resume: train is not a state folder"),
        (["--sample_prompts", "no.txt"], "--sample_prompts: there is no file no.txt"),
        (["--sample_every_n_steps", "5"], "--sample_every_n_steps needs sample_prompts"),
        (["--sample_at_first"], "--sample_at_first needs sample_prompts"),
        (["--output_dir", "vae.safetensors"], "--output_dir: vae.safetensors cannot be made"),
        (["--logging_dir", "vae.safetensors/logs"], "--logging_dir: vae.safetensors/logs cannot be made"),
        (["--output_name", "a/b"], "--output_name: 'a/b' cannot be a file name"),
        (["--output_name", "é" * 91], "--output_name: is longer than 180 bytes"),
        (["--vae", "x" * 5000], "cannot be read: File name too long"),
    ],
)
def test_wrong_values(needed_flags, words, message):
    assert message in error_of([*needed_flags, *words])


def test_reading_settings_makes_no_folders(workplace, needed_flags):
    read_settings([*needed_flags, "--output_dir", "a/b", "--logging_dir", "c"])
    assert not (workplace / "a").exists() and not (workplace / "c").exists()


def test_a_log_folder_does_not_matter_when_nothing_is_logged(needed_flags):
    read_settings([*needed_flags, "--log_with", "none", "--logging_dir", "vae.safetensors/logs"])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--vae_batch_size", "4"], "vae_batch_size"),
        (["--persistent_data_loader_workers"], "persistent_data_loader_workers"),
        (["--lr_scheduler_num_cycles", "2"], "lr_scheduler_num_cycles"),
        (["--lr_scheduler_power", "2", "--lr_scheduler", "linear"], "lr_scheduler_power"),
        (["--lr_scheduler_min_lr_ratio", "0.1", "--lr_scheduler", "cosine"], "lr_scheduler_min_lr_ratio"),
        (["--anima_sigmoid_scale", "2", "--anima_timestep_sampling", "uniform"], "anima_sigmoid_scale"),
        (["--max_train_steps", "5", "--max_train_epochs", "2"], "max_train_steps"),
        (["--keep_tokens", "2"], "keep_tokens"),
        (["--min_bucket_reso", "512"], "min_bucket_reso"),
        (["--save_state", "--save_state_on_train_end"], "save_state_on_train_end"),
        (["--sample_prompts", "vae.safetensors"], "sample_prompts"),
    ],
)
def test_options_without_effect_are_named_once(needed_flags, caplog, words, name):
    read_settings([*needed_flags, *words])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"command line: --{name} does nothing: ")


@pytest.mark.parametrize(
    "words",
    [
        ["--vae_batch_size", "4", "--cache_latents"],
        ["--vae_batch_size", "1"],
        ["--lr_scheduler_num_cycles", "2", "--lr_scheduler", "cosine_with_restarts"],
        ["--keep_tokens", "2", "--shuffle_caption"],
        ["--keep_tokens", "2", "--caption_tag_dropout_rate", "0.1"],
        ["--min_bucket_reso", "512", "--enable_bucket"],
        ["--sample_prompts", "vae.safetensors", "--sample_at_first"],
    ],
)
def test_options_with_effect_are_not_warned_of(needed_flags, caplog, words):
    read_settings([*needed_flags, *words])
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_more_context_rows_than_inference_has_are_warned_of(needed_flags, caplog):
    read_settings([*needed_flags, "--anima_seq_len", "640"])
    assert "command line: --anima_seq_len: short captions get 640 context rows, where inference" in caplog.text


def test_missing_folders_are_told_with_wrong_numbers(workplace, model_flags):
    (workplace / "sets.toml").write_text(
        '[[datasets]]\nresolution = 50\n[[datasets.subsets]]\nimage_dir = "gone"\n'
        '[[datasets.subsets]]\nimage_dir = "more"\nconditioning_data_dir = "masks"\n'
    )
    said = error_of([*model_flags, "--dataset_config", "sets.toml", "--enable_bucket"])
    for part in (
        "sets.toml:2: datasets.resolution: 50x50 goes beyond",
        "sets.toml:4: datasets.subsets.image_dir: there is no folder gone",
        "sets.toml:7: datasets.subsets.conditioning_data_dir: there is no folder masks",
    ):
        assert said.count(part) == 1


def test_sizes_that_are_trained_as_others_are_warned_of_with_their_place(workplace, model_flags, caplog):
    (workplace / "sets.toml").write_text(
        '[[datasets]]\nresolution = "250,256"\n[[datasets.subsets]]\nimage_dir = "more"\n'
        '[[datasets]]\nresolutions = [64, 100]\n[[datasets.subsets]]\nimage_dir = "more"\n'
    )
    read_settings([*model_flags, "--dataset_config", "sets.toml", "--no-enable_bucket"])
    assert [record.getMessage() for record in caplog.records if "is trained at" in record.getMessage()] == [
        "sets.toml:2: datasets.resolution: 250x256 is trained at 240x256: sides must be multiples of 16",
        "sets.toml:6: datasets.resolutions: 100x100 is trained at 96x96: sides must be multiples of 16",
    ]


@pytest.mark.parametrize(
    ("line", "words", "message"),
    [
        ("bucket_reso_steps = 10", ["--enable_bucket"], "sets.toml:2: datasets.bucket_reso_steps: 10 is out of range"),
        ("", ["--learning_rate=-1"], "command line: --learning_rate: -1.0 is out of range"),
        (
            "[[datasets.subsets]]\nimage_dri = 'more'",
            [],
            "sets.toml:3: unknown setting datasets.subsets.image_dri",
        ),
        ("[[datasets.subsets]]\nnum_repeats = 2", [], "sets.toml:2: this subset has no image_dir"),
    ],
)
def test_a_mistake_is_told_once(workplace, model_flags, line, words, message):
    (workplace / "sets.toml").write_text(f'[[datasets]]\n{line}\n[[datasets.subsets]]\nimage_dir = "more"\n')
    (told,) = error_of([*model_flags, "--dataset_config", "sets.toml", *words]).splitlines()
    assert message in told
