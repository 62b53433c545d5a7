"""Every shipped configuration is read without a warning, with stand-ins for the files it names."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from library.settings import read_settings
from library.settings.toml_files import read_toml

EXAMPLES = Path(__file__).parents[2] / "configs" / "examples"
SETTINGS_FILES = sorted(path.name for path in EXAMPLES.glob("*.toml") if not path.name.endswith("_dataset.toml"))
FOLDER_KEYS = ("t5_tokenizer_dir", "train_data_dir", "data_dir", "image_dir")
FILE_KEYS = (
    "pretrained_model_name_or_path",
    "transformer_path",
    "vae",
    "vae_path",
    "qwen",
    "text_encoder_path",
    "sample_prompts",
)


def make_stand_ins(folder: Path, example: Path) -> None:
    file = read_toml(example)
    subsets = [subset for dataset in file.tables.get("datasets", []) for subset in dataset["subsets"]]
    for name, value in [
        *((entry.name, entry.value) for entry in file.flat_entries()),
        *((name, value) for subset in subsets for name, value in subset.items()),
    ]:
        if name in FOLDER_KEYS:
            (folder / value).mkdir(parents=True)
            Image.new("RGB", (64, 64)).save(folder / value / "a.png")
        elif name in FILE_KEYS:
            (folder / value).parent.mkdir(parents=True, exist_ok=True)
            (folder / value).touch()


@pytest.mark.parametrize("name", SETTINGS_FILES)
def test_example_is_read_without_a_warning(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    make_stand_ins(tmp_path, EXAMPLES / name)
    words = ["--config_file", str(EXAMPLES / name)]
    dataset = EXAMPLES / name.replace("_train_args.toml", "_dataset.toml")
    if dataset.name != name:
        make_stand_ins(tmp_path, dataset)
        words += ["--dataset_config", str(dataset)]
    settings = read_settings(words)
    assert settings.datasets
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_examples_are_found():
    assert {"lora_single_file.toml", "lora_train_args.toml", "quickstart.toml"} <= set(SETTINGS_FILES)
