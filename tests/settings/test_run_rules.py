"""Rules and warnings about attention, precision, the start of a run, and bucket limits."""

import pytest

from library.errors import SettingError
from library.settings import read_settings, settings_and_problems


def error_of(words):
    with pytest.raises(SettingError) as caught:
        read_settings(words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "backend"),
    [
        ([], "auto"),
        (["--anima_attention_backend", "cudnn"], "cudnn"),
        (["--attn_mode", "flash"], "flash"),
        (["--attn_mode", "sdpa"], "torch"),
        (["--xformers"], "xformers"),
        (["--xfomers"], "xformers"),
        (["--sdpa"], "torch"),
        (["--mem_eff_attn"], "torch"),
        (["--xformers", "--no-xfomers"], "xformers"),
        (["--anima_attention_backend", "xformers", "--no-xfomers", "--no-sdpa"], "xformers"),
        (["--anima_attention_backend", "auto", "--xformers", "--xfomers"], "xformers"),
        (["--attn_mode", "xformers", "--xformers"], "xformers"),
        (["--sdpa", "--mem_eff_attn"], "torch"),
    ],
)
def test_the_attention_backend_asked_for(needed_flags, words, backend):
    assert read_settings([*needed_flags, *words]).model.attention_backend == backend


@pytest.mark.parametrize("value", ["true", "false"])
def test_the_misspelling_turns_nothing_off_in_a_file(workplace, needed_flags, value):
    (workplace / "a.toml").write_text(f"xformers = true\nxfomers = {value}\n")
    assert read_settings([*needed_flags, "--config_file", "a.toml"]).model.attention_backend == "xformers"


def test_contradictory_attention_settings_are_named_with_their_places(workplace, needed_flags):
    (workplace / "a.toml").write_text('xformers = true\nattn_mode = "flash"\n')
    assert error_of([*needed_flags, "--config_file", "a.toml", "--sdpa"]) == (
        "a.toml:2: attn_mode and a.toml:1: xformers and command line: --sdpa: "
        "these choose flash and xformers and torch for attention; keep one of them"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--full_bf16", "--full_fp16"], "--full_bf16 contradicts command line: --full_fp16: keep one of them"),
        (
            ["--full_bf16", "--mixed_precision", "fp16"],
            "--full_bf16 contradicts command line: --mixed_precision = fp16: set mixed_precision",
        ),
        (["--full_fp16", "--mixed_precision", "no"], '= no: set mixed_precision = "fp16", or drop one of them'),
    ],
)
def test_contradictory_precisions(needed_flags, words, message):
    assert message in error_of([*needed_flags, *words])


@pytest.mark.parametrize("name", ["full_bf16", "full_fp16"])
def test_full_precision_says_once_that_adapters_stay_fp32(needed_flags, caplog, name):
    precision = name.removeprefix("full_")
    settings = read_settings([*needed_flags, f"--{name}", "--mixed_precision", precision])
    assert settings.run.precision == precision
    (warning,) = caplog.messages
    assert warning == (
        f"command line: --{name}: the model runs in {precision}; adapter weights and optimizer state stay fp32, as "
        "small updates would be lost"
    )


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("place", ["file", "command line"])
def test_gradient_checkpointing_can_be_turned_on_and_off(workplace, needed_flags, place, value):
    words = [f"--{'no-' if value == 'false' else ''}gradient_checkpointing"]
    if place == "file":
        (workplace / "a.toml").write_text(f"gradient_checkpointing = {value}\n")
        words = ["--config_file", "a.toml"]
    assert read_settings([*needed_flags, *words]).run.gradient_checkpointing is (value == "true")


@pytest.mark.parametrize("name", ["lowram", "highvram"])
def test_settings_about_memory_that_do_nothing_are_named(needed_flags, caplog, name):
    read_settings([*needed_flags, f"--{name}"])
    (warning,) = caplog.messages
    assert warning.startswith(f"command line: --{name} does nothing: models ")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--skip_until_initial_step"], "skip_until_initial_step"),
        (["--initial_step", "5", "--initial_epoch", "3"], "initial_epoch"),
    ],
)
def test_starting_points_without_effect_are_named(needed_flags, caplog, words, name):
    read_settings([*needed_flags, *words])
    (warning,) = caplog.messages
    assert warning.startswith(f"command line: --{name} does nothing: ")


def test_whether_the_latest_state_makes_a_starting_point_useless_is_not_known_yet(workplace, needed_flags, caplog):
    (workplace / "x-state").mkdir()
    (workplace / "x-state" / "run_state.json").touch()
    for resume, told in (("latest", []), ("x-state", ["command line: --initial_step does nothing: resume goes on"])):
        caplog.clear()
        read_settings([*needed_flags, "--initial_step", "5", "--resume", resume])
        assert [message.partition(" from ")[0] for message in caplog.messages] == told


def test_epochs_are_counted_from_one(needed_flags):
    """0 is what GUIs write for an empty field."""
    assert "--initial_epoch: -1 is out of range; give 1 or more" in error_of([*needed_flags, "--initial_epoch=-1"])
    assert read_settings([*needed_flags, "--initial_epoch", "0"]).run.initial_epoch == 1


def test_a_resolution_beyond_the_bucket_limits_names_both_places(workplace, model_flags):
    """With the place in the dataset file, or what is nearest to it."""
    (workplace / "d.toml").write_text(
        "[general]\nmax_bucket_reso = 768\n[[datasets]]\nenable_bucket = true\nresolution = 1024\n"
        '[[datasets.subsets]]\nimage_dir = "more"\n'
    )
    assert error_of([*model_flags, "--dataset_config", "d.toml"]) == (
        "d.toml:5: datasets.resolution: 1024x1024 goes beyond d.toml:2: general.max_bucket_reso, which is 768: "
        "change the one or the other"
    )


def test_a_resolution_below_the_bucket_limits(needed_flags):
    words = ["--enable_bucket", "--resolution", "512,200"]
    assert "--resolution: 512x200 goes beyond min_bucket_reso, which is 256: change the one or the other" in error_of(
        [*needed_flags, *words]
    )
    read_settings([*needed_flags, "--resolution", "512,200"])


def test_problems_are_returned_for_a_common_report_unless_numbers_are_wrong(needed_flags):
    settings, problems = settings_and_problems([*needed_flags, "--sample_at_first", "--network_weights", "gone"])
    assert settings.sampling.sample_at_first
    assert len(problems) == 2
    with pytest.raises(SettingError, match=r"network_dim: 0 is out of range; give 1 or more\n.*there is no file gone"):
        settings_and_problems([*needed_flags, "--network_dim", "0", "--network_weights", "gone"])


def test_one_report_tells_wrong_names_types_numbers_files_and_combinations(needed_flags, tmp_path):
    """What a misspelt or misread setting would have said is left out: nothing is told of it twice."""
    file = tmp_path / "five.toml"
    file.write_text(
        'learing_rate = 1e-4\nnetwork_dim = "four"\nanima_seq_len = 100\noptimizer_type = "RAdamScheduleFree"\n'
        'lr_scheduler = "cosine"\nnetwork_weights = "gone.safetensors"\nvea = "x"\n'
    )
    problems = error_of(["--config_file", str(file), *(word for word in needed_flags if "vae" not in word)]).split("\n")
    assert [int(problem.split(":")[1]) for problem in problems] == [1, 2, 7, 3, 5, 6]
