"""Encoders that are loaded when they are first used."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from library.anima_runtime import known_models
from library.anima_runtime import vae as vae_module
from library.anima_runtime.encoders import LazyTextEncoder, LazyVAE
from library.anima_runtime.known_models import KnownModels
from library.anima_runtime.text.encoding import TextEncoder
from library.anima_runtime.text.qwen3 import load_qwen3
from library.anima_runtime.text.tokenizer_plans import plan_qwen_tokenizer, plan_t5_tokenizer
from library.anima_runtime.text.tokenizer_sources import TokenizerSettings
from library.anima_runtime.text.tokenizers import load_qwen_tokenizer, load_t5_tokenizer
from library.anima_runtime.vae import load_vae
from library.errors import ModelFileError
from library.tensor_cache import identity_of

CPU = torch.device("cpu")


@pytest.fixture
def models(tiny_anima, tmp_path, monkeypatch) -> Path:
    """A copy of the tiny models, which counts as old enough at once."""
    monkeypatch.setattr(known_models, "_TOO_YOUNG_NS", -1)
    return Path(shutil.copytree(tiny_anima, tmp_path / "models"))


def lazy_vae(models: Path, dtype: torch.dtype = torch.float32) -> LazyVAE:
    return LazyVAE(models / "qwen_image_vae.safetensors", dtype, CPU, KnownModels(models / "models.json"))


def lazy_text_encoder(models: Path) -> LazyTextEncoder:
    settings = TokenizerSettings()
    plans = plan_qwen_tokenizer(models / "qwen3", None, settings), plan_t5_tokenizer(models / "t5", settings)
    return LazyTextEncoder(models / "qwen3", torch.float32, CPU, *plans, False, KnownModels(models / "models.json"))


def is_loaded(encoder: LazyVAE | LazyTextEncoder) -> bool:
    return encoder._once.if_made() is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vae_is_known_by_what_its_tensors_are_once_it_was_loaded(models, dtype):
    expected = identity_of(load_vae(models / "qwen_image_vae.safetensors", dtype, CPU).model)
    first = lazy_vae(models, dtype)
    assert not first.is_known and first.identity() == expected and is_loaded(first) and not first.is_known
    again = lazy_vae(models, dtype)
    again.leave_device()
    assert again.is_known and again.identity() == expected and not is_loaded(again)
    assert not lazy_vae(models, torch.float16).is_known


def test_a_text_encoder_is_known_with_its_tokenizers(models):
    tokenizers = load_qwen_tokenizer(models / "qwen3"), load_t5_tokenizer(models / "t5")
    plain = TextEncoder(load_qwen3(models / "qwen3", torch.float32, "cpu"), *tokenizers)
    assert lazy_text_encoder(models).identity() == plain.identity()
    again = lazy_text_encoder(models)
    again.leave_device()
    assert again.is_known and again.identity() == plain.identity() and not is_loaded(again)
    (own,), (expected,) = again.encode(["red circle"]), plain.encode(["red circle"])
    assert is_loaded(again) and torch.equal(own.qwen_states, expected.qwen_states)
    assert torch.equal(own.t5_ids, expected.t5_ids)
    for changed in ("t5/tokenizer.json", "qwen3/tokenizer.json", "qwen3/model.safetensors", "qwen3/config.json"):
        lazy_text_encoder(models).identity()
        (models / changed).touch()
        assert not lazy_text_encoder(models).is_known, changed


def test_who_was_to_leave_before_it_was_loaded_lies_in_main_memory(models, monkeypatch):
    """A cached latent that was lost in mid-run has the VAE loaded as late as that, beside recorded steps."""
    loaded = Mock()
    monkeypatch.setattr(vae_module, "load_vae", lambda *_: loaded)
    vae = lazy_vae(models)
    vae.leave_device()
    vae.load()
    loaded.to.assert_called_once_with("cpu")


def test_several_threads_load_it_once(models, monkeypatch):
    """Loader threads read pictures side by side."""
    loads, load = [], vae_module.load_vae
    monkeypatch.setattr(vae_module, "load_vae", lambda *where: time.sleep(0.05) or loads.append(where) or load(*where))
    vae = lazy_vae(models)
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(lambda _: id(vae.loaded), range(4)))
    assert len(found) == len(loads) == 1


def test_wrong_files_are_told_from_their_headers(models):
    shutil.copy(models / "anima.safetensors", models / "qwen_image_vae.safetensors")
    with pytest.raises(ModelFileError, match="was given as a Qwen-Image VAE"):
        lazy_vae(models).check()
    (models / "qwen3" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelFileError, match="was given as the Qwen3 text encoder"):
        lazy_text_encoder(models).plan_qwen()
