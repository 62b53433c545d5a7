"""A folder with stand-ins for the model's files and one picture, as settings need them to exist."""

from pathlib import Path

import pytest
from PIL import Image

MODEL_FLAGS = (
    "--pretrained_model_name_or_path",
    "anima.safetensors",
    "--vae",
    "vae.safetensors",
    "--qwen",
    "qwen.safetensors",
    "--t5_tokenizer_dir",
    "t5",
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory for the test: model files, `train/10_cat/` with a picture, `more/` with another."""
    for name in ("anima.safetensors", "vae.safetensors", "qwen.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "t5").mkdir()
    for folder in ("train/10_cat", "more"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / folder / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model_flags(workplace: Path) -> list[str]:
    """Command-line words that name the model's files."""
    return list(MODEL_FLAGS)


@pytest.fixture
def needed_flags(model_flags: list[str]) -> list[str]:
    """The least a run needs: model files and pictures."""
    return [*model_flags, "--train_data_dir", "train"]
