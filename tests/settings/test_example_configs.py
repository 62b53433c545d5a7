"""Every shipped config is read without a warning, and names the files that are missing where they are."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from PIL import Image

from library.errors import SettingError
from library.settings import read_settings, settings_as_flat_dict
from library.settings.toml_files import read_toml
from tests.shipped_configs import NAMES, OVERLAY, ROOT, small_words_for, words_for

CHINESE = re.compile(r"[\u4e00-\u9fff]")


def stand_ins(words: list[str], folder: Path) -> None:
    """Makes the files and folders that settings files name."""
    for path in map(Path, words[1::2]):
        file = read_toml(path)
        subsets = [subset for dataset in file.tables.get("datasets", []) for subset in dataset["subsets"]]
        named = [(entry.name, entry.value) for entry in file.flat_entries()]
        for name, value in [*named, *(item for subset in subsets for item in subset.items())]:
            if name in OVERLAY["folders"]["pictures"] or name == "t5_tokenizer_dir":
                (folder / value).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 64)).save(folder / value / "a.png")
            elif name in OVERLAY["model_files"]:
                (folder / value).parent.mkdir(parents=True, exist_ok=True)
                (folder / value).touch()


@pytest.mark.parametrize("name", NAMES)
def test_config_is_read_without_a_warning(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    stand_ins(words_for(name), tmp_path)
    settings = read_settings(words_for(name))
    assert settings.datasets
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("name", NAMES)
def test_without_the_files_each_is_named(name, tmp_path, monkeypatch):
    """What the overlay swaps is refused as it stands: by key, and before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError) as caught:
        read_settings(words_for(name))
    for path in map(Path, words_for(name)[1::2]):
        for entry in read_toml(path).flat_entries():
            if entry.name in OVERLAY["model_files"] and entry.name not in ("t5_tokenizer_dir", "sample_prompts"):
                assert f"{entry.source}: {entry.label}: {entry.value} does not exist" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_overlay_changes_nothing_but_what_it_declares(name, tiny_anima, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_ins(words_for(name), tmp_path)
    shipped = settings_as_flat_dict(read_settings(words_for(name)))
    (tmp_path / "small").mkdir()
    small = settings_as_flat_dict(read_settings(small_words_for(words_for(name), tiny_anima, tmp_path / "small")))
    assert changed_keys(shipped, small) <= {
        "pretrained_model_name_or_path", "vae", "qwen", "t5_tokenizer_dir", "sample_prompts",
        "train_data_dir", "dataset_config", "image_dir", "output_dir", "logging_dir",
        "resolution", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "blocks_to_swap",
        "max_train_steps", "max_train_epochs", *OVERLAY["switches"]["off"],
    }  # fmt: skip


def changed_keys(first: dict, second: dict) -> set[str]:
    """The keys whose values differ, in the datasets and subsets as well."""
    keys = {key for key in first if first[key] != second[key] and key not in ("datasets", "subsets")}
    for level in ("datasets", "subsets"):
        for one, other in zip(first.get(level, []), second.get(level, []), strict=True):
            keys |= changed_keys(one, other)
    return keys


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/*.toml")), ids=lambda path: path.name)
def test_config_is_commented_in_both_languages(path):
    comments = re.findall(r"#.*", path.read_text(encoding="utf-8"))
    assert sum(bool(CHINESE.search(comment)) for comment in comments) >= 4
    assert all(re.search("[a-z]", comment) or CHINESE.search(comment) for comment in comments if comment.strip("# "))


def test_configs_are_found():
    assert {"examples/lora_single_file.toml", "examples/lora_train_args.toml", "smoke/lora.toml"} <= set(NAMES)
