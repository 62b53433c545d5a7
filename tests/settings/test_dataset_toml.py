from pathlib import Path

import pytest

from library.errors import SettingError
from library.settings import read_settings

DATASETS = """\
[general]
shuffle_caption = true
keep_tokens = 1
resolution = 768

[[datasets]]
batch_size = 2
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "train/10_cat"
  keep_tokens = 3

  [[datasets.subsets]]
  image_dir = "more"
  shuffle_caption = false

[[datasets]]
resolution = [832, 1216]

  [[datasets.subsets]]
  image_dir = "more"
  num_repeats = 4
"""


def write(workplace: Path, text: str, name: str = "dataset.toml") -> str:
    (workplace / name).write_text(text, encoding="utf-8")
    return name


def error_of(words: list[str]) -> str:
    with pytest.raises(SettingError) as caught:
        read_settings(words)
    return str(caught.value)


def test_inner_values_win(workplace, model_flags):
    first, second = read_settings([*model_flags, "--dataset_config", write(workplace, DATASETS)]).datasets
    assert (first.resolution, first.batch_size) == ((768, 768), 2)
    assert (second.resolution, second.batch_size) == ((832, 1216), 1)
    assert [subset.keep_tokens for subset in first.subsets] == [3, 2]
    assert [subset.shuffle_caption for subset in first.subsets] == [True, False]
    assert [subset.image_dir for subset in first.subsets] == [Path("train/10_cat"), Path("more")]
    assert (second.subsets[0].keep_tokens, second.subsets[0].num_repeats) == (1, 4)


def test_sources_are_kept_for_each_table(workplace, model_flags):
    given = read_settings([*model_flags, "--dataset_config", write(workplace, DATASETS)]).given
    assert given["general.resolution"].source == "dataset.toml:4"
    assert given["datasets[0].subsets[0].keep_tokens"].source == "dataset.toml:12"
    assert given["datasets[1].subsets[0].num_repeats"].source == "dataset.toml:23"


def test_settings_file_and_command_line_are_the_last_resort(workplace, model_flags, caplog):
    write(workplace, "resolution = 512\ncaption_prefix = 'anime, '\nnum_repeats = 9\n", "my.toml")
    words = ["--config_file", "my.toml", "--dataset_config", write(workplace, DATASETS), "--keep_tokens", "7"]
    first, second = read_settings([*model_flags, *words]).datasets
    assert first.resolution == (768, 768)
    assert first.subsets[0].caption_prefix == "anime, "
    assert [first.subsets[1].num_repeats, second.subsets[0].num_repeats] == [9, 4]
    assert first.subsets[0].keep_tokens == 3
    assert "--keep_tokens = 7 (command line) gives way" in caplog.text
    assert "datasets.subsets.keep_tokens = 3 (dataset.toml:12)" in caplog.text


def test_agreeing_command_line_is_not_warned_of(workplace, model_flags, caplog):
    text = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'more'\n"
    read_settings([*model_flags, "--dataset_config", write(workplace, text), "--resolution", "512"])
    assert "gives way" not in caplog.text


def test_without_tables_the_folder_and_top_level_options_make_one_dataset(workplace, needed_flags):
    words = ["--resolution", "768", "--shuffle_caption", "--num_repeats", "3", "--enable_bucket"]
    (dataset,) = read_settings([*needed_flags, *words]).datasets
    assert (dataset.resolution, dataset.enable_bucket) == ((768, 768), True)
    (subset,) = dataset.subsets
    assert (subset.image_dir, subset.num_repeats, subset.shuffle_caption) == (Path("train/10_cat"), 10, True)
    (plain,) = read_settings([*needed_flags, *words, "--train_data_dir", "more"]).datasets
    assert plain.subsets[0].num_repeats == 3


def test_inline_tables_in_the_settings_file(workplace, model_flags):
    text = f"seed = 3\n{DATASETS}\n[training]\nlearning_rate = 1e-3\nresolution = 256\nnum_repeats = 9\n"
    config = write(workplace, text, "my.toml")
    settings = read_settings([*model_flags, "--config_file", config])
    assert (settings.run.seed, settings.optimizer.learning_rate) == (3, 1e-3)
    assert [dataset.resolution for dataset in settings.datasets] == [(768, 768), (832, 1216)]
    assert settings.datasets[0].subsets[0].num_repeats == 9


def test_dataset_config_replaces_inline_tables_with_a_warning(workplace, model_flags, caplog):
    config = write(workplace, DATASETS, "my.toml")
    other = write(workplace, "[[datasets]]\nresolution = 256\n[[datasets.subsets]]\nimage_dir = 'more'\n")
    settings = read_settings([*model_flags, "--config_file", config, "--dataset_config", other])
    assert [dataset.resolution for dataset in settings.datasets] == [(256, 256)]
    assert settings.datasets[0].subsets[0].shuffle_caption is False
    assert (
        "--dataset_config = dataset.toml (command line) replaces the [[datasets]] of the settings file" in caplog.text
    )


def test_pictures_named_twice_or_not_at_all(workplace, model_flags, needed_flags):
    both = error_of([*needed_flags, "--dataset_config", write(workplace, DATASETS)])
    assert "--train_data_dir = train (command line) and --dataset_config = dataset.toml (command line) both" in both
    neither = error_of(model_flags)
    assert "set train_data_dir to a folder, or dataset_config to a dataset TOML" in neither


def test_missing_picture_folder_is_told_with_the_other_problems(workplace, model_flags, caplog):
    words = ["--train_data_dir", "nowhere", "--network_dim", "0", "--min_bucket_reso", "512", "--enable_bucket"]
    message = error_of([*model_flags, *words])
    assert "command line: --train_data_dir: picture folder nowhere does not exist" in message
    assert caplog.records == []
    assert "--network_dim: 0 is out of range" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolution = 512", "dataset.toml:1: resolution does not belong at the top of a dataset file"),
        ("[general]\nseed = 1", "dataset.toml:2: general.seed does not belong here; put it into the settings file"),
        (
            "[general]\nimage_dir = 'a'",
            "dataset.toml:2: general.image_dir does not belong here; put it under [[datasets",
        ),
        ("[general]\nkeep_token = 1", "dataset.toml:2: unknown setting general.keep_token; did you mean keep_tokens"),
        ("general = 3", "dataset.toml:1: general must be a table"),
        ("[general]", "dataset.toml: at least one table [[datasets]] is needed"),
        ("[datasets]\nresolution = 3", "dataset.toml:1: at least one table [[datasets]] is needed"),
        ("[[datasets]]", "dataset.toml:1: at least one table [[datasets.subsets]] is needed"),
        ("[[datasets]]\n[[datasets.subsets]]", "dataset.toml:2: this subset has no image_dir"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'more'\nresolution = 5",
            "dataset.toml:4: datasets.subsets.resolution does not belong here; put it under [general] or [[datasets]]",
        ),
        (
            "[[datasets]]\nresolution = 'x'\n[[datasets.subsets]]\nimage_dir = 'more'",
            "dataset.toml:2: datasets.resolution = 'x': expected a side in pixels",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'more'\nnetwork_multiplier = 2",
            "dataset.toml:4: datasets.subsets.network_multiplier = 2: not available here",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'more'\ncaption_dropout_rate = 10",
            "dataset.toml:4: datasets.subsets.caption_dropout_rate: 10.0 is out of range; give from 0 to 1",
        ),
    ],
)
def test_wrong_dataset_files(workplace, model_flags, text, message):
    assert message in error_of([*model_flags, "--dataset_config", write(workplace, text)])
