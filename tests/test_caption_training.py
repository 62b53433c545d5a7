"""Whole runs with every choice of captions switched on: what the text encoder is told."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from anima_train_network import main
from train_network import NetworkTrainer

CHOICES = {
    "caption_mix": "tags=1, nl=1, tags+nl=1, nl+tags=1",
    "shuffle_caption": True,
    "keep_tokens": 1,
    "caption_tag_dropout_rate": 0.3,
    "token_warmup_step": 0.5,
    "shuffle_sentences": True,
    "enable_wildcard": True,
    "caption_prefix": "{photo|film}:",
    "caption_dropout_every_n_epochs": 2,
    "num_repeats": 2,
    "train_batch_size": 3,
    "log_with": "none",
}


@pytest.fixture
def pictures(tiny_anima, tmp_path) -> Path:
    """Pictures of both fields."""
    folder = Path(shutil.copytree(tiny_anima / "train", tmp_path / "train"))
    for path in folder.rglob("*.txt"):
        path.write_text("sks, {red|blue} cat, two, three, four")
        path.with_suffix(".nl.txt").write_text("It sits. It {sleeps|runs}!\nOne line. Another.")
    return folder


@pytest.fixture
def told(monkeypatch, losses) -> list[list[tuple[int, str, int, str]]]:
    """(epoch, picture, repeat, caption) of the samples of every step of the runs of a test."""
    seen = []
    step = NetworkTrainer.step

    def recorded(self, batches, sample_count):
        seen.append(
            [(*key, caption) for each in batches for key, caption in zip(each.keys, each.captions, strict=True)]
        )
        return step(self, batches, sample_count)

    monkeypatch.setattr(NetworkTrainer, "step", recorded)
    return seen


@pytest.mark.parametrize("filled", [False, True])
def test_captions_with_a_cache_and_after_a_resume(config, pictures, losses, told, tmp_path, filled):
    common = {**CHOICES, "train_data_dir": pictures, "max_train_epochs": 2, "fill_last_batches": filled}
    main(config(**common, save_every_n_steps=2, save_state=True))
    whole, whole_losses = list(told), list(losses)
    samples = [sample for step in whole for sample in step]
    assert (len({len(step) for step in whole}) == 1) == filled
    assert {caption for epoch, _, _, caption in samples if epoch == 1} == {""}
    captions = [caption for epoch, _, _, caption in samples if epoch != 1]
    assert len(set(captions)) > 5
    assert all(re.match(r"(photo|film): (sks|It |One line|Another)", caption) for caption in captions)
    assert not any(re.search(r"[{}|\n]", caption) for caption in captions)

    told.clear()
    losses.clear()
    main(config(**common, cache_text_encoder_outputs=True))
    assert (told, losses) == (whole, whole_losses)

    told.clear()
    losses.clear()
    main(config(**common, resume=tmp_path / "output" / "tiny-step00000002-state"))
    assert told == whole[2:] and losses == whole_losses[2:]
