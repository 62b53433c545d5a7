import json
import logging
from pathlib import Path

import pytest

from library.errors import SettingError
from library.settings import read_settings, settings_as_flat_dict
from library.settings.kohya_only import FIXED, NO_EFFECT, REFUSED


def write(workplace: Path, text: str, name: str = "my.toml") -> str:
    (workplace / name).write_text(text, encoding="utf-8")
    return name


def error_of(words: list[str]) -> str:
    with pytest.raises(SettingError) as caught:
        read_settings(words)
    return str(caught.value)


def test_command_line_wins_over_file_and_file_over_default(workplace, needed_flags):
    config = write(workplace, "seed = 1\n[optimizer]\nlearning_rate = 2e-3\nlr_scheduler = 'linear'\n")
    settings = read_settings([*needed_flags, "--config_file", config, "--learning_rate", "5e-4"])
    assert settings.optimizer.learning_rate == 5e-4
    assert settings.run.seed == 1
    assert settings.schedule.lr_scheduler == "linear"
    assert settings.network.network_dim == 4
    assert (settings.given["learning_rate"].source, settings.given["learning_rate"].label) == (
        "command line",
        "--learning_rate",
    )
    assert (settings.given["seed"].value, settings.given["seed"].source) == (1, "my.toml:1")
    assert "network_dim" not in settings.given


def test_command_line_overrides_an_alias_in_the_file(workplace, needed_flags):
    config = write(workplace, "train_batch_size = 2\nqwen3 = 'none'\n")
    settings = read_settings([*needed_flags, "--config_file", config, "--batch_size", "3"])
    assert settings.datasets[0].batch_size == 3
    assert settings.model.qwen == Path("qwen.safetensors")


def test_config_file_ending_may_be_left_off(workplace, needed_flags):
    write(workplace, "seed = 9")
    assert read_settings([*needed_flags, "--config_file", "my"]).run.seed == 9
    assert "there is no file other or other.toml" in error_of([*needed_flags, "--config_file", "other"])
    assert error_of(["--config_file", "a/other.toml"]) == "--config_file: there is no file a/other.toml"


def test_without_arguments_the_settings_file_is_named_first(workplace):
    first, *others = error_of([]).splitlines()
    assert first.startswith("nothing is set: name a settings file by --config_file")
    assert len(others) == 4


def test_nothing_is_said_of_a_default_in_place_of_what_could_not_be_read(workplace, needed_flags):
    config = write(workplace, 'enable_bucket = true\nmax_bucket_reso = 512\nresolution = "512,abc"\nbatch_size = 0\n')
    lines = error_of([*needed_flags, "--config_file", config]).splitlines()
    assert [line.partition(" = ")[0].rpartition(": ")[0] or line for line in lines] == [
        "my.toml:3",
        "my.toml:4: batch_size",
    ]


def test_switches_can_be_turned_off_and_left_automatic(workplace, needed_flags):
    config = write(workplace, "cache_latents = true\ngradient_checkpointing = true")
    settings = read_settings([*needed_flags, "--config_file", config, "--no-cache_latents"])
    assert settings.data.cache_latents is False
    assert settings.run.gradient_checkpointing is True
    assert read_settings(needed_flags).run.gradient_checkpointing is None


def test_false_as_text_is_false(workplace, needed_flags):
    config = write(workplace, 'cache_latents = "false"\nsave_state = "True"')
    settings = read_settings([*needed_flags, "--config_file", config])
    assert settings.data.cache_latents is False
    assert settings.saving.save_state is True


def test_switch_followed_by_a_value_is_refused(needed_flags):
    message = error_of([*needed_flags, "--cache_latents", "false"])
    assert "'false' follows no option" in message
    assert "--no-NAME" in message


def test_all_problems_of_a_file_are_told_together(workplace, needed_flags):
    config = write(workplace, "learning_rat = 1\n\n[run]\nseed = 'x'\nmax_train_step = 3\nmixed_precision = 'BF16'\n")
    lines = error_of([*needed_flags, "--config_file", config]).splitlines()
    assert lines[0] == "my.toml:1: unknown setting learning_rat; did you mean learning_rate?"
    assert lines[1] == "my.toml:4: run.seed = 'x': expected a whole number"
    assert lines[2].startswith("my.toml:5: unknown setting run.max_train_step; did you mean max_train_steps")
    assert lines[3].startswith(
        "my.toml:6: run.mixed_precision = 'BF16': expected one of no, fp16, bf16; did you mean bf16"
    )
    assert len(lines) == 4


def test_unknown_flags_are_all_named_with_suggestions(needed_flags):
    message = error_of([*needed_flags, "--network_dims", "4", "--xyzzy=3"])
    assert "--network_dims; did you mean --network_dim" in message
    assert "unknown option --xyzzy" in message


def test_config_is_not_config_file(workplace):
    config = write(workplace, "seed = 1")
    assert error_of(["--config", config]) == (
        "command line: --config is not available here: a settings file is named by config_file"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--vae", "vae.safetensors", "--train_batch_size", "1", "--batch_size", "2"],
        ["--config_file", "aliases.toml"],
    ],
)
def test_two_spellings_with_different_values_are_both_named(workplace, needed_flags, words):
    write(workplace, "batch_size = 1\ntrain_batch_size = 2", "aliases.toml")
    message = error_of([*needed_flags, *words])
    assert "contradicts" in message
    assert "train_batch_size" in message
    assert "batch_size =" in message


def test_two_spellings_with_the_same_value_are_fine(workplace, needed_flags):
    config = write(workplace, "batch_size = 2\ntrain_batch_size = 2")
    assert read_settings([*needed_flags, "--config_file", config]).datasets[0].batch_size == 2


def test_same_key_under_two_headings_with_different_values(workplace, needed_flags):
    config = write(workplace, "[a]\nseed = 1\n[b]\nseed = 2\n")
    assert "my.toml:4: b.seed = 2: contradicts a.seed = 1 (my.toml:2)" in error_of(
        [*needed_flags, "--config_file", config]
    )


def test_settings_without_effect_on_anima_are_named_once(workplace, needed_flags, caplog):
    config = write(workplace, "[model]\nv2 = true\nv_parameterization = false\nclip_skip = 2\n")
    read_settings([*needed_flags, "--config_file", config, "--min_snr_gamma", "5"])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [sum(name in text for text in warnings) for name in ("v2", "clip_skip", "min_snr_gamma")] == [1, 1, 1]
    assert not any("v_parameterization" in text for text in warnings)
    assert any(text.startswith("my.toml:4: model.clip_skip does nothing: ") for text in warnings)


def test_kohya_settings_at_the_only_value_there_is(workplace, needed_flags, caplog):
    config = write(workplace, "save_model_as = 'safetensors'\nsdpa = true\nmodel_prediction_type = 'raw'\n")
    read_settings([*needed_flags, "--config_file", config, "--network_train_unet_only"])
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_kohya_settings_at_other_values_are_refused(workplace, needed_flags):
    names = [*FIXED, *REFUSED]
    config = write(workplace, "\n".join(f"{name} = 'other'" for name in names))
    for number, (name, line) in enumerate(zip(names, error_of(["--config_file", config]).splitlines(), strict=True), 1):
        fixed, refused = f"{name} = 'other': not available here; only", f"{name} is not available here: "
        assert line.startswith(f"my.toml:{number}: {fixed if name in FIXED else refused}")
    typed = error_of([word for name in names for word in (f"--{name}", "other")])
    assert [line.split()[2] for line in typed.splitlines()] == [f"--{name}" for name in names]


@pytest.mark.parametrize("value", ["false", "0", '""', "[]", "'none'"])
def test_kohya_settings_that_ask_for_nothing_are_accepted(workplace, needed_flags, value, caplog):
    config = write(workplace, "\n".join(f"{name} = {value}" for name in (*NO_EFFECT, *REFUSED)))
    read_settings([*needed_flags, "--config_file", config])
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_empty_text_leaves_unset(workplace, needed_flags):
    config = write(workplace, 'resume = ""\nnetwork_weights = ""\ndataset_config = ""\nmax_train_epochs = ""')
    settings = read_settings([*needed_flags, "--config_file", config])
    assert settings.run.resume is None
    assert settings.run.max_train_epochs is None


def test_steps_on_the_command_line_replace_epochs_of_the_file(workplace, needed_flags, caplog):
    config = write(workplace, "max_train_epochs = 10")
    settings = read_settings([*needed_flags, "--config_file", config, "--max_train_steps", "20"])
    assert (settings.run.max_train_steps, settings.run.max_train_epochs) == (20, None)
    assert "--max_train_steps = 20 (command line) replaces max_train_epochs = 10 (my.toml:1)" in caplog.text
    caplog.clear()
    both = ["--max_train_steps", "20", "--max_train_epochs", "3"]
    assert read_settings([*needed_flags, "--config_file", config, *both]).run.max_train_epochs == 3
    assert "replaces" not in caplog.text


def test_kohya_headings_model_and_training_are_not_root_style(workplace, needed_flags, caplog):
    config = write(workplace, "[model]\nvae = 'vae.safetensors'\n[training]\nlearning_rate = 1e-3\nseed = 5\n")
    settings = read_settings([*needed_flags, "--config_file", config])
    assert settings.network.network_dim == 4
    assert settings.run.mixed_precision == "no"
    assert "root-style" not in caplog.text


def test_flat_dict_holds_every_resolved_value_as_json(workplace, needed_flags):
    settings = read_settings([*needed_flags, "--resolution", "512", "--network_args", "a=1", "b=2"])
    flat = json.loads(json.dumps(settings_as_flat_dict(settings)))
    assert flat["vae"] == "vae.safetensors"
    assert flat["network_args"] == ["a=1", "b=2"]
    assert flat["datasets"][0]["resolution"] == [512, 512]
    assert Path(flat["datasets"][0]["subsets"][0]["image_dir"]) == Path("train/10_cat")
    assert "given" not in flat


def test_help_lists_options_and_aliases(capsys):
    with pytest.raises(SystemExit) as caught:
        read_settings(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--learning_rate" in text
    assert "Same as --batch_size" in text
