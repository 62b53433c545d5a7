"""All settings as text: what is shown, and a file that gives the same settings again."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.errors import SettingError
from library.options import Secret, option
from library.settings import groups, read_settings
from library.settings.collect import resolve_settings
from library.settings.listing import PICTURE_SOURCES, config_text, explanation
from library.settings.toml_files import read_toml, toml_value

DATASETS = """
[general]
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = [64, 96]
[[datasets.subsets]]
image_dir = 'more'
num_repeats = 3
[[datasets]]
resolution = 128
batch_size = 2
[[datasets.subsets]]
image_dir = 'train/10_cat'
[[datasets.subsets]]
image_dir = 'more'
caption_prefix = 'a "b" \\ é, '
"""


def comparable(settings):
    """All but where values came from, and what named the pictures."""
    data = dataclasses.replace(
        settings.data, **{name: None for name in PICTURE_SOURCES if hasattr(settings.data, name)}
    )
    return dataclasses.replace(settings, data=data, given={})


def read_again(workplace, settings, *words):
    (workplace / "again.toml").write_text(config_text(settings), encoding="utf-8")
    return read_settings(["--config_file", "again.toml", *words])


def line_of(text, name):
    (line,) = [line for line in text.splitlines() if line.lstrip("# ").startswith((f"{name} =", f"{name} is unset"))]
    return " ".join(line.split())


OTHER_DATASETS = """
[[datasets]]
resolutions = [64, [64, 96]]
validation_split = 0.5
[[datasets.subsets]]
image_dir = 'more'
is_reg = true
prior_loss_weight = 0.5
conditioning_data_dir = 'train/10_cat'
[[datasets.subsets]]
image_dir = 'more'
metadata_file = 'meta.json'
timestep_offset = -100
resize_interpolation = 'area'
"""

SOURCES = {
    "folder": ["--train_data_dir", "train"],
    "folder with options": ["--train_data_dir", ".", "--num_repeats", "2", "--class_tokens", "x", "--resolution", "64"],
    "datasets": ["--dataset_config", "d.toml"],
    "other datasets": ["--dataset_config", "e.toml"],
    "regularisation": ["--train_data_dir", "train", "--reg_data_dir", "more", "--prior_loss_weight", "0.5"],
    "metadata file": ["--train_data_dir", "more", "--in_json", "meta.json"],
    "every kind of value": [
        "--train_data_dir", "train", "--network_args", "a=1", "b=x,y", "--optimizer_args", "betas=(0.9, 0.99)",
        "--learning_rate", "1e-8", "--max_train_epochs", "3", "--no-train_norm", "--output_name", "x \u3042 'é'",
        "--base_weights", "vae.safetensors", "--base_weights_multiplier", "0.5", "--adapter_format", "kohya", "comfy",
        "--lr_warmup_steps", "0.1", "--training_comment", 'line\none\t"two" \\ \x7f', "--no-gradient_checkpointing",
    ],
}  # fmt: skip


@pytest.mark.parametrize("words", SOURCES.values(), ids=SOURCES)
def test_the_written_file_gives_equal_settings(workplace, model_flags, words):
    (workplace / "d.toml").write_text(DATASETS)
    (workplace / "e.toml").write_text(OTHER_DATASETS)
    (workplace / "meta.json").write_text('{"more/a.png": {"caption": "a"}}')
    settings = read_settings([*model_flags, *words])
    again = read_again(workplace, settings)
    assert comparable(again) == comparable(settings)
    assert config_text(again).count("\n[[") == config_text(settings).count("\n[[")


def test_root_style_defaults_are_kept(workplace):
    (workplace / "root.toml").write_text(
        "[model]\ntransformer_path = 'anima.safetensors'\nvae_path = 'vae.safetensors'\n"
        "text_encoder_path = 'qwen.safetensors'\nt5_tokenizer_dir = 't5'\n[dataset]\ndata_dir = 'train'\nrepeats = 4\n"
        "[lora]\nlora_rank = 8\n[optimizer]\nbeta2 = 0.95\n"
    )
    settings = read_settings(["--config_file", "root.toml"])
    assert (settings.network.network_dim, settings.run.mixed_precision) == (8, "bf16")
    assert comparable(read_again(workplace, settings)) == comparable(settings)


def test_what_all_datasets_share_gives_way_to_the_command_line(workplace, model_flags):
    (workplace / "d.toml").write_text(DATASETS)
    settings = read_settings([*model_flags, "--dataset_config", "d.toml"])
    again = read_again(workplace, settings, "--keep_tokens", "5", "--batch_size", "7")
    assert [subset.keep_tokens for dataset in again.datasets for subset in dataset.subsets] == [5, 5, 5]
    assert [dataset.batch_size for dataset in again.datasets] == [1, 2]  # each table has its own, which wins


def test_each_value_is_shown_with_its_source(workplace, model_flags):
    (workplace / "d.toml").write_text(DATASETS)
    (workplace / "my.toml").write_text(
        "[training]\ngradient_accumulation_steps = 2\nanima_transformer = 'x'\nseed = 42\n"
    )
    words = [*model_flags[2:], "--config_file", "my.toml", "--dataset_config", "d.toml", "--learning_rate", "3e-5"]
    text = explanation(read_settings_unchecked(words))
    assert line_of(text, "learning_rate") == "learning_rate = 3e-05 # command line"
    assert line_of(text, "gradient_accumulation_steps") == "gradient_accumulation_steps = 2 # my.toml:2"
    assert line_of(text, "pretrained_model_name_or_path") == (
        'pretrained_model_name_or_path = "x" # my.toml:3, as training.anima_transformer'
    )
    assert line_of(text, "seed") == "seed = 42 # my.toml:4"
    assert line_of(text, "network_dim") == "network_dim = 4 # default"
    assert line_of(text, "unet_lr") == "unet_lr is unset # default"
    assert line_of(text, "keep_tokens") == "keep_tokens = 1 # d.toml:4"
    assert line_of(text, "flip_aug") == "flip_aug = false # default"
    assert "[64, 96]" in text
    assert text.index("resolution = [64, 96]") < text.index("num_repeats = 3") < text.index("resolution = [128, 128]")


def test_what_a_folders_name_says_is_shown_as_such(workplace, needed_flags):
    text = explanation(read_settings([*needed_flags, "--num_repeats", "2"]))
    assert line_of(text, "num_repeats") == "num_repeats = 10 # from its folder"
    assert line_of(text, "train_data_dir") == (
        'train_data_dir = "train" # command line; its pictures are in the tables below'
    )


def read_settings_unchecked(words):
    problems = []
    settings = resolve_settings(words, problems)
    assert problems == []
    return settings


def test_a_secret_is_in_no_text(workplace, needed_flags, monkeypatch, caplog):
    @dataclasses.dataclass(frozen=True)
    class WithKey:
        api_key: Secret | None = option(None, "")

    fields = [("upload", WithKey), *((f.name, f.type, f) for f in dataclasses.fields(groups.Settings))]
    wider = dataclasses.make_dataclass("Wider", fields, frozen=True, namespace={"__module__": groups.__name__})
    monkeypatch.setattr(groups, "WithKey", WithKey, raising=False)
    for module in ("groups", "collect"):
        monkeypatch.setattr(f"library.settings.{module}.Settings", wider)
    settings = read_settings([*needed_flags, "--api_key", "abc123"])
    assert settings.upload.api_key.reveal() == "abc123"
    flat = groups.settings_as_flat_dict(settings)
    for text in (explanation(settings), config_text(settings), str(settings), str(flat), str(settings.given)):
        assert "abc123" not in text
    assert line_of(explanation(settings), "api_key").startswith("api_key = (hidden) # command line; not written")
    assert "# api_key" in config_text(settings)
    assert flat["api_key"] is None
    (workplace / "my.toml").write_text("api_key = ['abc123']")
    with pytest.raises(SettingError) as caught:
        read_settings([*needed_flags, "--config_file", "my.toml"])
    assert "api_key = (hidden): expected a text" in str(caught.value)


plain = st.one_of(
    st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)  # fmt: skip


@given(
    value=st.one_of(plain, st.lists(plain), st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), plain))
)
def test_values_written_as_toml_are_read_as_they_were(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("toml") / "a.toml"
    path.write_bytes(f"x = {toml_value(value)}".encode())
    assert read_toml(path).tables["x"] == value
