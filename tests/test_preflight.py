"""--preflight through the command line, on the tiny model: real steps, a table, and nothing left behind."""

from __future__ import annotations

import re

import pytest
import torch

import train_network
from anima_train_network import AnimaNetworkTrainer, main

ROW = re.compile(r"^ +(\d+x\d+) +(\d+) +([\d.]+) +([\d.]+) +[\d.]+ [GM]iB$", re.MULTILINE)


@pytest.fixture
def windows(monkeypatch):
    """The windows of batches of each optimizer step: [(bucket, pictures), …]."""
    seen = []
    step = AnimaNetworkTrainer.step

    def recorded(self, batches, sample_count):
        seen.append([(batch.bucket, len(batch.captions)) for batch in batches])
        assert sample_count == sum(size for _, size in seen[-1])
        return step(self, batches, sample_count)

    monkeypatch.setattr(AnimaNetworkTrainer, "step", recorded)
    return seen


def test_each_bucket_is_tried_twice_and_nothing_is_saved(config, windows, tmp_path, capsys):
    """Four pictures of as many buckets, 10 uses each: batches of 4, 4 and 2, or 2.5 of 4."""
    assert main(config(preflight=True, max_train_epochs=3)) == 0
    told = capsys.readouterr().err
    rows = ROW.findall(told)
    assert [row[:3] for row in rows] == [(bucket, "4", "2.5") for bucket in ("96x32", "48x80", "80x48", "64x64")]
    tried = [[((96, 32), 4)], [((48, 80), 4)], [((80, 48), 4)], [((64, 64), 4)]]
    assert windows == [window for window in tried for _ in range(2)]
    seconds = 3 * sum(2.5 * float(row[3]) for row in rows)
    found = re.search(r"time: about (\d+) s for 36 steps, which are 3.0 epochs of (\d+) s", told)
    assert float(found[1]) == pytest.approx(seconds, abs=0.6)
    assert float(found[2]) == pytest.approx(seconds / 3, abs=0.6)
    assert "model: 2 blocks, attention torch, gradient checkpointing off" in told
    assert "length: 36 steps of 12 an epoch, from 4 pictures" in told
    assert "files: 1 adapters of 0.1 MiB" in told
    assert "caches: 0 MiB of latents in main memory\n" in told
    assert "torch_compile off: there is no CUDA device\n  cuda_graphs off: there is no CUDA device\n" in told
    assert [path for name in ("logs", "output") for path in (tmp_path / name).rglob("*")] == []


def test_a_step_has_all_its_batches(config, windows, capsys):
    """Of 30 uses in a bucket two make a batch and three batches a step: 5 steps an epoch."""
    words = config(
        preflight=True, gradient_accumulation_steps=3, train_batch_size=2, enable_bucket=False, cache_latents=False
    )
    assert main(words) == 0
    assert windows == [[((64, 64), 2)] * 3] * 2
    assert [row[:3] for row in ROW.findall(capsys.readouterr().err)] == [("64x64", "2", "6.7")]


def test_a_card_that_is_nearly_full_is_warned_of(config, monkeypatch, capsys):
    """Every trial takes more than what is said to be free; nothing fails."""
    monkeypatch.setattr(train_network, "memory_limit", lambda device: 1)
    assert main(config(preflight=True, enable_bucket=False)) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "preflight: with a batch of 4 x 64x64 pixels, more than 95% of the GPU's memory is in use" in told
    assert "What needs less memory: " in told and "gradient_checkpointing = true" in told


def test_room_for_states_and_saves_is_told(config, capsys):
    words = config(preflight=True, enable_bucket=False, max_train_epochs=3, save_state=True, save_every_n_epochs=1)
    assert main(words) == 0
    told = capsys.readouterr().err
    assert re.search(r"files: 3 adapters of 0\.1 MiB, 3 states of up to 0\.\d MiB; [\d.]+ GiB are free", told)


def test_a_schedule_shorter_than_the_trial_is_no_obstacle(config, windows):
    words = config(
        preflight=True,
        max_train_steps=1,
        lr_scheduler_type="OneCycleLR",
        lr_scheduler_args=["max_lr=1e-3", "total_steps=2"],
    )
    assert main(words) == 0
    assert len(windows) == 8


def test_a_bucket_without_room_is_told_with_what_would_help(config, monkeypatch, capsys):
    """Only the largest bucket fails; the others are measured all the same."""
    losses = AnimaNetworkTrainer.losses

    def tight(self, inputs):
        if inputs.noisy_BCTHW.shape[-2:] == (8, 8):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, inputs)

    monkeypatch.setattr(AnimaNetworkTrainer, "losses", tight)
    assert main(config(preflight=True, gradient_checkpointing=False)) == 1
    told = capsys.readouterr().err
    assert len(ROW.findall(told)) == 3
    assert re.search(r"^ +64x64 +4 +2.5 +out of memory$", told, re.MULTILINE)
    assert "time: unknown, as it does not fit" in told
    assert told.partition("error: ")[2].strip() == (
        "preflight: out of GPU memory in a batch of 4 x 64x64 pixels. What needs less memory: "
        "cache_text_encoder_outputs = true; gradient_checkpointing = true; fp8_base = true; blocks_to_swap = 1; "
        "batch_size = 2 with gradient_accumulation_steps = 2; a smaller resolution"
    )


def test_what_is_in_force_is_not_proposed(config, monkeypatch, capsys):
    def full(self, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AnimaNetworkTrainer, "losses", full)
    words = config(
        preflight=True, gradient_checkpointing=True, cache_text_encoder_outputs=True, fp8_base=True,
        blocks_to_swap=1, train_batch_size=1,
    )  # fmt: skip
    assert main(words) == 1
    assert capsys.readouterr().err.strip().endswith("What needs less memory: a smaller resolution")


def test_a_resumed_run_has_only_its_rest_to_do(config, capsys):
    assert main(config(max_train_steps=2, save_state_on_train_end=True)) == 0
    assert main(config(preflight=True, max_train_steps=8, resume="latest")) == 0
    assert "for 6 steps, which are 0.5 epochs" in capsys.readouterr().err


def test_preflight_and_dry_run_exclude_each_other(config, capsys):
    assert main(config(preflight=True, dry_run=True)) == 1
    assert "preflight: dry_run loads no model, and preflight needs one; keep one of them" in capsys.readouterr().err


def test_batches_that_are_filled_are_tried_whole(config, windows, capsys):
    """The 10 uses of each bucket fill one batch of 16."""
    assert main(config(preflight=True, train_batch_size=16, fill_last_batches=True, max_train_epochs=1)) == 0
    told = capsys.readouterr().err
    assert [row[1:3] for row in ROW.findall(told)] == [("16", "1.0")] * 4
    assert {size for window in windows for _, size in window} == {16}
    assert re.findall(r"10 +1 +6$", told, re.MULTILINE) == ["10        1          6"] * 4
