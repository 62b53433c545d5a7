"""What is done instead of training: showing and writing settings."""

import pytest

from anima_train_network import main
from library.errors import SettingError
from library.settings import read_settings
from library.settings.answers import answers_instead


def test_explain_shows_every_setting_and_trains_nothing(workplace, needed_flags, capsys):
    assert main([*needed_flags, "--explain", "--learning_rate", "3e-5"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate = 3e-05" in shown
    assert "# command line" in shown
    assert "# default" in shown
    assert sorted(path.name for path in workplace.iterdir()) == sorted(
        ["anima.safetensors", "vae.safetensors", "qwen.safetensors", "t5", "train", "more"]
    )


def test_explain_shows_settings_although_no_pictures_are_named(workplace, model_flags, capsys):
    assert main([*model_flags, "--explain"]) == 1
    captured = capsys.readouterr()
    assert 'vae = "vae.safetensors"' in captured.out
    assert "no pictures are named" in captured.err


def test_output_config_writes_that_file_alone(workplace, needed_flags, caplog):
    before = set(workplace.rglob("*"))
    assert main([*needed_flags, "--network_dim", "9", "--output_config", "new/out.toml"]) == 0
    assert set(workplace.rglob("*")) - before == {workplace / "new", workplace / "new" / "out.toml"}
    assert read_settings(["--config_file", "new/out.toml"]).network.network_dim == 9


def test_output_config_replaces_no_file(workplace, needed_flags, capsys):
    (workplace / "mine.toml").write_text("seed = 1")
    assert main([*needed_flags, "--config_file", "mine.toml", "--output_config", "mine.toml"]) == 1
    assert "--output_config: mine.toml exists already" in capsys.readouterr().err
    assert (workplace / "mine.toml").read_text() == "seed = 1"


def test_output_config_needs_a_name(workplace, needed_flags):
    with pytest.raises(SettingError, match="--output_config: expected one argument"):
        answers_instead([*needed_flags, "--output_config"])


def test_output_config_into_a_folder_that_cannot_be(workplace, needed_flags):
    with pytest.raises(SettingError, match=r"--output_config: vae.safetensors.x.toml cannot be written"):
        answers_instead([*needed_flags, "--output_config", "vae.safetensors/x.toml"])


def test_only_the_main_process_answers(workplace, needed_flags, capsys):
    assert answers_instead([*needed_flags, "--explain", "--output_config", "a.toml"], is_main_process=False)
    assert capsys.readouterr().out == ""
    assert not (workplace / "a.toml").exists()


def test_a_run_is_not_answered(needed_flags, capsys):
    assert not answers_instead(needed_flags)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["explain", "config_file", "output_config", "print_options", "from_adapter"])
def test_the_programs_own_flags_are_refused_in_a_file(workplace, needed_flags, name):
    (workplace / "my.toml").write_text(f"[a]\n{name} = 'x'")
    with pytest.raises(SettingError, match=rf"my.toml:2: a.{name} belongs on the command line: --{name}"):
        read_settings([*needed_flags, "--config_file", "my.toml"])


def test_print_options_tells_defaults_types_aliases_and_advice(capsys):
    assert main(["--print_options", "network"]) == 0
    shown = capsys.readouterr().out
    assert "network_dim = 4  (whole number)" in shown
    assert "  learning_rate = " not in shown.partition("unet_lr")[0]
    assert main(["--print_options"]) == 0
    everything = capsys.readouterr().out
    assert "batch_size = 1  (whole number; also train_batch_size)" in everything
    assert "[subsets]" in everything
    assert "config_file is unset" in everything or "config_file = unset" in everything


def test_print_options_of_an_unknown_group_names_the_groups(capsys):
    assert main(["--print_options", "netwerk"]) == 1
    assert "no group 'netwerk'; did you mean network?; there are all, program, model, " in capsys.readouterr().err
