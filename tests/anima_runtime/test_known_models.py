"""What is remembered of models, and when it no longer holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from library.anima_runtime import known_models
from library.anima_runtime.known_models import FileStamps, KnownModels


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files count as old enough at once."""
    monkeypatch.setattr(known_models, "_TOO_YOUNG_NS", -1)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / "models" / name for name in ("a.safetensors", "b.json")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_text(path.name)
    return paths


def test_an_identity_is_known_of_unchanged_files_alone(files, tmp_path):
    file = tmp_path / "cache" / "models.json"
    assert KnownModels(file).identity("VAE", FileStamps.of(files)) is None
    KnownModels(file).remember("VAE", FileStamps.of(files), "1f")
    KnownModels(file).remember("Qwen3", FileStamps.of(files), "2e")
    assert KnownModels(file).identity("VAE", FileStamps.of(files[::-1])) == "1f"
    assert KnownModels(file).identity("Qwen3", FileStamps.of(files)) == "2e"
    assert KnownModels(file).identity("VAE, float16", FileStamps.of(files)) is None
    assert KnownModels(file).identity("VAE", FileStamps.of(files[:1])) is None
    assert str(tmp_path) not in file.read_text()


def test_a_file_that_was_replaced_by_one_of_its_size_and_time_is_another(files, tmp_path):
    file, times = tmp_path / "models.json", (files[0].stat().st_atime_ns, files[0].stat().st_mtime_ns)
    KnownModels(file).remember("VAE", FileStamps.of(files), "1f")
    new = tmp_path / "new"
    new.write_text("b.safetensors")
    new.replace(files[0])
    os.utime(files[0], ns=times)
    assert KnownModels(file).identity("VAE", FileStamps.of(files)) is None


def test_what_is_as_young_as_its_stamp_is_exact_is_not_remembered(files, tmp_path, monkeypatch):
    monkeypatch.setattr(known_models, "_TOO_YOUNG_NS", 10**12)
    KnownModels(tmp_path / "models.json").remember("VAE", FileStamps.of(files), "1f")
    assert not (tmp_path / "models.json").exists()


def test_nothing_is_remembered_nowhere_and_by_other_processes(files, tmp_path):
    KnownModels(None).remember("VAE", FileStamps.of(files), "1f")
    assert KnownModels(None).identity("VAE", FileStamps.of(files)) is None
    KnownModels(tmp_path / "models.json", writes=False).remember("VAE", FileStamps.of(files), "1f")
    assert not (tmp_path / "models.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2}', '{"version": 2, "models": {"VAE": 3}}'])
def test_a_broken_memory_is_none(files, tmp_path, content):
    file = tmp_path / "models.json"
    file.write_text(content)
    assert KnownModels(file).identity("VAE", FileStamps.of(files)) is None
    KnownModels(file).remember("VAE", FileStamps.of(files), "1f")
    assert KnownModels(file).identity("VAE", FileStamps.of(files)) == "1f"


def test_where_nothing_can_be_written_a_run_goes_on(files, tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level("INFO"):
        KnownModels(tmp_path / "file" / "models.json").remember("VAE", FileStamps.of(files), "1f")
    assert "models.json cannot be written" in caplog.text
