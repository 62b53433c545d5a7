"""Caches of whole runs in processes of their own: two at once, and a disk that is full in the middle."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from library.anima_runtime.vae import AnimaVAE
from library.tensor_cache import TensorCache
from tests.training_runs import TrainingRun, tensor_bytes

PICTURES = 24


@pytest.fixture
def words(config, tmp_path):
    """words("name", **settings) -> those of a run that caches 24 pictures and their captions in tmp_path / "cache"."""
    train = tmp_path / "train"
    train.mkdir()
    for number in range(PICTURES):
        Image.new("RGB", (64, 64), (10 * number, 5 * number, 255 - 10 * number)).save(train / f"{number:02}.png")
        (train / f"{number:02}.txt").write_text(f"cat, number {number}", encoding="utf-8")

    def make(name: str, **settings) -> list[str]:
        common = {
            "train_data_dir": train, "output_name": name, "cache_latents": False, "cache_latents_to_disk": True,
            "cache_text_encoder_outputs_to_disk": True, "shuffle_caption": True, "cache_dir": tmp_path / "cache",
            "seed": 3, "log_with": "none", "max_train_steps": 3,
        }  # fmt: skip
        option, file = config(**{**common, **settings})
        return [option, str(Path(file).rename(tmp_path / f"{name}.toml"))]

    return make


def slow_encoder() -> None:
    """Pictures take so long that two runs meet at every one."""
    encode = AnimaVAE.encode

    def slowly(self, pixels_BCHW):
        time.sleep(0.1)
        return encode(self, pixels_BCHW)

    AnimaVAE.encode = slowly


def whole_entries(cache: Path) -> int:
    """How many cached latents there are; every one must be readable, and nothing half-written may lie beside them."""
    assert not [path for path in cache.rglob("*") if path.name.startswith(".")]
    found = [TensorCache(path.parents[1]).read(path.stem) for path in cache.glob("*/latents/*/*.safetensors")]
    assert all(entry is not None and entry["latents"].isfinite().all() for entry in found)
    return len(found)


def test_two_runs_that_cache_into_one_folder_at_once_train_as_one_does(words, tmp_path):
    runs = [TrainingRun(words(name), tmp_path / f"{name}.log", slow_encoder) for name in ("one", "two")]
    for run in runs:
        assert run.end() == 0, run.output
        assert int(re.search(r"latents on disk: (\d+) of", run.output)[1]) < PICTURES  # so both were caching
    assert whole_entries(tmp_path / "cache") == PICTURES
    (index,) = (tmp_path / "cache").glob("*/pictures.json")
    assert isinstance(json.loads(index.read_text(encoding="utf-8"))["pictures"], dict)
    warm = TrainingRun(words("warm"), tmp_path / "warm.log")
    assert warm.end() == 0, warm.output
    assert f"latents on disk: {PICTURES} of {PICTURES} found" in warm.output
    results = [tensor_bytes(tmp_path / "output" / f"{name}.safetensors") for name in ("one", "two", "warm")]
    assert results[0] == results[1] == results[2]


@pytest.fixture
def small_disk(tmp_path):
    """The cache's folder on a disk of its own, of 128 KiB; skips where that needs rights that are not there."""
    cache = tmp_path / "cache"
    cache.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(cache)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk can be mounted by root only")
    yield cache
    subprocess.run(["umount", "--lazy", str(cache)], check=True)


def test_a_disk_that_is_full_in_the_middle_is_told_and_caching_goes_on_when_there_is_room(words, tmp_path, small_disk):
    run = TrainingRun(words("first"), tmp_path / "first.log")
    assert run.end() == 1
    assert "Traceback" not in run.output
    told = re.search(r"error: latents cannot be cached in (\S+): No space left on device\. Free some space", run.output)
    assert told and Path(told[1]).is_relative_to(small_disk)
    kept = whole_entries(small_disk)
    assert 0 < kept < PICTURES
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    again = TrainingRun(words("again"), tmp_path / "again.log")
    assert again.end() == 0, again.output
    assert f"latents on disk: {kept} of {PICTURES} found" in again.output
    assert whole_entries(small_disk) == PICTURES
    plain = TrainingRun(words("plain", cache_dir=tmp_path / "other"), tmp_path / "plain.log")
    assert plain.end() == 0, plain.output
    assert tensor_bytes(tmp_path / "output" / "again.safetensors") == tensor_bytes(
        tmp_path / "output" / "plain.safetensors"
    )
