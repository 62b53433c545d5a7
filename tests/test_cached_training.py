"""Whole runs with caches: the same losses as without, and nothing encoded twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from anima_train_network import main
from library.anima_runtime.text.encoding import TextEncoder
from library.anima_runtime.vae import AnimaVAE
from tools import cache_dataset

RANDOM_CAPTIONS = {"shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "caption_dropout_rate": 0.2}


@pytest.fixture
def pictures(tiny_anima, tmp_path) -> Path:
    """Pictures of its own, beside which a cache may grow."""
    return Path(shutil.copytree(tiny_anima / "train", tmp_path / "train"))


@pytest.fixture
def encoded(monkeypatch) -> dict[str, int]:
    """How many captions and pictures Qwen3 and the VAE were given."""
    counts = {"captions": 0, "pictures": 0}
    encode_text, encode_pixels = TextEncoder.encode, AnimaVAE.encode

    def count_captions(self, captions, with_gradient=False):
        counts["captions"] += len(captions)
        return encode_text(self, captions, with_gradient)

    def count_pictures(self, pixels_BCHW):
        counts["pictures"] += len(pixels_BCHW)
        return encode_pixels(self, pixels_BCHW)

    monkeypatch.setattr(TextEncoder, "encode", count_captions)
    monkeypatch.setattr(AnimaVAE, "encode", count_pictures)
    return counts


@pytest.mark.parametrize("train_llm_adapter", [True, False])
def test_random_captions_are_the_same_with_cached_text(config, pictures, losses, encoded, train_llm_adapter):
    """Once without a cache, once filling one on disk, once from it: equal to the last bit."""
    common = {
        **RANDOM_CAPTIONS, "train_data_dir": pictures, "train_llm_adapter": train_llm_adapter, "max_train_steps": 4,
        "log_with": "none",
    }  # fmt: skip
    main(config(**common))
    uncached = dict(encoded)
    main(config(**common, cache_text_encoder_outputs_to_disk=True))
    assert losses[:4] == losses[4:8] and len(set(losses)) == 4
    filling = encoded["captions"] - uncached["captions"]
    assert filling > 4
    main(config(**common, cache_text_encoder_outputs_to_disk=True))
    assert losses[:4] == losses[8:12]
    assert encoded["captions"] == uncached["captions"] + filling


def test_latents_on_disk_train_as_those_in_memory(config, pictures, losses, encoded, tmp_path):
    common = {"train_data_dir": pictures, "max_train_steps": 3, "flip_aug": True, "log_with": "none"}
    main(config(**common))
    assert encoded["pictures"] == 8
    for expected in (16, 16):
        main(config(**common, cache_latents=False, cache_latents_to_disk=True))
        assert encoded["pictures"] == expected
    assert losses[:3] == losses[3:6] == losses[6:]
    with safe_open(tmp_path / "output" / "tiny.safetensors", "pt") as file:
        assert file.metadata()["ss_cache_latents"] == "True"


def test_a_dataset_cached_ahead_is_all_that_a_run_needs(config, pictures, losses, encoded, tmp_path, capsys):
    """Of two epochs; the caches lie in a folder of their own."""
    words = config(
        **RANDOM_CAPTIONS, train_data_dir=pictures, max_train_epochs=2, cache_dir=tmp_path / "cache", log_with="none",
        cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True, train_llm_adapter=False,
    )  # fmt: skip
    assert cache_dataset.main([*words, "--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "pictures: 4 latents ready" in said and f"captions: {encoded['captions']} ready" in said
    before = dict(encoded)
    assert before["pictures"] == 4 and not losses
    assert main(words) == 0
    assert encoded == before and len(losses) == 24
    assert not list(pictures.rglob("*.safetensors")) and list((tmp_path / "cache").rglob("*.safetensors"))


def test_caches_can_be_filled_when_the_run_has_saved(config, tmp_path, encoded):
    """The tool writes no adapter, so that none is in its way."""
    adapter = tmp_path / "output" / "tiny.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"earlier")
    words = config(
        overwrite_output=False, cache_dir=tmp_path / "cache",
        cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True,
    )  # fmt: skip
    assert cache_dataset.main([*words, "--epochs", "0"]) == 0
    assert encoded["pictures"] == 4
    assert adapter.read_bytes() == b"earlier"


def test_the_tool_says_what_the_run_will_not_use_and_shows_errors(config, tmp_path, capsys):
    assert cache_dataset.main([*config(cache_dir=tmp_path / "cache"), "--no_latents", "--epochs", "0"]) == 0
    said = capsys.readouterr()
    for name in ("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"):
        assert f"{name} is off in these settings" in said.err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert cache_dataset.main(config(vae=tmp_path / "none.safetensors")) == 1
    assert "none.safetensors does not exist" in capsys.readouterr().err


def test_caches_and_what_changes_at_each_use_contradict(config, capsys):
    for option, value in (("color_aug", True), ("random_crop", True), ("face_crop_aug_range", "2.0,4.0")):
        assert main(config(**{option: value})) == 1
        said = capsys.readouterr().err
        assert option in said and "cache_latents" in said
