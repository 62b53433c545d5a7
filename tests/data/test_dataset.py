"""Batches are the same with any number of workers, from any starting step, on any rank."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter

import pytest
import torch

from library.data import dataset
from library.data.dataset import TrainingBatches, _BatchDataset, _Entry
from library.data.epochs import BatchPlan, Item
from library.data.latents import cache_latents
from library.data.pictures import scan_datasets
from library.data.pixels import load_pixels
from library.data.settings import DatasetSettings, SubsetSettings


@pytest.fixture
def pictures(tmp_path, draw):
    for index in range(7):
        draw(f"p{index}", (64, 64) if index < 5 else (128, 32), "one, two, three, four")
    subset = SubsetSettings(image_dir=tmp_path, num_repeats=2, shuffle_caption=True, flip_aug=True)
    dataset = DatasetSettings(
        resolution=(64, 64),
        enable_bucket=True,
        min_bucket_reso=32,
        max_bucket_reso=128,
        bucket_reso_steps=32,
        subsets=(subset,),
    )
    return scan_datasets([dataset], skip_broken=False, show_progress=False)


def summary(steps):
    """Everything in the steps, in comparable form."""
    return [
        (
            step.sample_count,
            [(b.keys, b.captions, b.bucket, b.counted, b.pixels_BCHW.sum().item()) for b in step.batches],
        )
        for step in steps
    ]


def test_batches_hold_the_pictures_of_their_keys(pictures):
    by_key = {picture.key: picture for picture in pictures}
    seen, buckets = Counter(), set()
    for step in TrainingBatches(pictures, [2], seed=1).epoch(3):
        (batch,) = step.batches
        buckets.add(batch.bucket)
        assert step.sample_count == len(batch.keys) and batch.counted and batch.latents_BCTHW is None
        assert batch.pixels_BCHW.shape == (len(batch.keys), 3, batch.bucket[1], batch.bucket[0])
        for pixels_CHW, caption, path, (epoch, key, repeat) in zip(
            batch.pixels_BCHW, batch.captions, batch.paths, batch.keys, strict=True
        ):
            straight = load_pixels(by_key[key].path, batch.bucket, flipped=False)
            assert torch.equal(pixels_CHW, straight) or torch.equal(pixels_CHW, straight.flip(2))
            assert path == by_key[key].path
            assert sorted(caption.split(", ")) == ["four", "one", "three", "two"]
            seen[epoch, key, repeat] += 1
    assert buckets == {(64, 64), (128, 32)}
    assert seen == Counter((3, key, repeat) for key in by_key for repeat in range(2))


def test_half_of_the_uses_are_flipped(pictures):
    dataset = _BatchDataset(
        pictures[:1], seed=1, latents={(pictures[0].key, flip): torch.tensor(flip) for flip in (False, True)}
    )
    entry = _Entry(0, 0, BatchPlan(tuple(Item(0, repeat) for repeat in range(1000))))
    assert 437 <= dataset[entry].latents_BCTHW.sum().item() <= 563  # 500 expected, 4 standard deviations are 63


def test_workers_change_nothing(pictures):
    alone = TrainingBatches(pictures, [2], seed=1, accumulation=2)
    expected = [summary(alone.epoch(epoch)) for epoch in (0, 1)]
    assert expected[0] != expected[1]
    kept = TrainingBatches(pictures, [2], seed=1, accumulation=2, workers=2, persistent_workers=True)
    unfinished = kept.epoch(5)
    next(unfinished)
    assert [summary(kept.epoch(epoch)) for epoch in (0, 1)] == expected
    fresh = TrainingBatches(pictures, [2], seed=1, accumulation=2, workers=2)
    assert summary(fresh.epoch(1)) == expected[1]


def test_variants_masks_and_weights_are_the_same_with_workers_and_on_ranks(tmp_path, draw):
    names = ["p0", "p1", "p2_40_30_12_10", "p3_70_20_12_10"]  # two with faces
    for name in [*(f"own/{name}" for name in names), *(f"masks/{name}" for name in names), "reg/r0"]:
        draw(name, (96, 64), "x")
    own = SubsetSettings(
        image_dir=tmp_path / "own", num_repeats=2, flip_aug=True, random_crop=True, color_aug=True,
        face_crop_aug_range=(2.0, 4.0), conditioning_data_dir=tmp_path / "masks",
    )  # fmt: skip
    reg = SubsetSettings(image_dir=tmp_path / "reg", is_reg=True, prior_loss_weight=0.25)
    dataset = DatasetSettings(resolutions=((64, 64), (32, 32)), subsets=(own, reg))
    pictures = scan_datasets([dataset], skip_broken=False, show_progress=False)

    def samples(**more):
        return {
            key: (weight.item(), mask_1HW.tolist(), pixels_CHW.tolist())
            for step in TrainingBatches(pictures, [3], seed=1, **more).epoch(0)
            for batch in step.batches
            if batch.counted
            for key, weight, mask_1HW, pixels_CHW in zip(
                batch.keys, batch.loss_weights, batch.loss_mask_B1HW, batch.pixels_BCHW, strict=True
            )
        }

    alone = samples()
    assert len(alone) == 2 * (8 + 8)
    assert {weight for weight, _, _ in alone.values()} == {0.25, 1.0}
    assert samples(workers=2) == alone
    assert samples(rank=0, world_size=2) | samples(rank=1, world_size=2) == alone


def test_persistent_workers_live_on(pictures):
    loader = TrainingBatches(pictures, [2], seed=1, workers=1, persistent_workers=True)
    processes = []
    for epoch in (0, 1):
        list(loader.epoch(epoch))
        processes.append({child.pid for child in multiprocessing.active_children()})
    assert processes[0] & processes[1]


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl+C to one process")
def test_workers_go_on_after_ctrl_c(pictures):
    loader = TrainingBatches(pictures, [2], seed=1, workers=1)
    steps = loader.epoch(0)
    next(steps)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    assert len(list(steps)) == 6


def test_datasets_can_be_sent_to_spawned_processes(pictures):
    copy = pickle.loads(pickle.dumps(_BatchDataset(pictures, 1, None)))
    entry = _Entry(0, 0, BatchPlan((Item(0, 0),)))
    assert torch.equal(copy[entry].pixels_BCHW, _BatchDataset(pictures, 1, None)[entry].pixels_BCHW)


def test_starting_in_the_middle(pictures):
    loader = TrainingBatches(pictures, [2], seed=1, accumulation=3)
    assert summary(loader.epoch(0, first_step=1)) == summary(loader.epoch(0))[1:]


def test_seed_changes_the_stream(pictures):
    streams = [summary(TrainingBatches(pictures, [2], seed=seed).epoch(0)) for seed in (1, 1, 2)]
    assert streams[0] == streams[1] != streams[2]


def test_global_random_state_neither_matters_nor_moves(pictures):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = summary(TrainingBatches(pictures, [2], seed=1).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert summary(TrainingBatches(pictures, [2], seed=1).epoch(0)) == first


def test_ranks_share_the_epoch(pictures):
    ranks = [list(TrainingBatches(pictures, [2], 1, rank=rank, world_size=3).epoch(0)) for rank in range(3)]
    assert len({len(steps) for steps in ranks}) == 1
    seen = Counter()
    for steps in zip(*ranks, strict=True):
        assert len({len(step.batches) for step in steps}) == 1
        counted = [batch for step in steps for batch in step.batches if batch.counted]
        assert {step.sample_count for step in steps} == {sum(len(batch.keys) for batch in counted)}
        seen.update(key for batch in counted for key in batch.keys)
    assert seen == Counter((0, picture.key, repeat) for picture in pictures for repeat in range(2))


def test_filled_batches_are_the_same_with_workers_on_ranks_and_from_the_middle(pictures):
    """Uses 10 and 4 in batches of 3 lack 2 and 2."""

    def steps(first_step=0, **more):
        return list(TrainingBatches(pictures, [3], 1, filled={0}, **more).epoch(2, first_step))

    def samples(*runs):
        return [
            (key, caption, pixels_CHW.sum().item())
            for run in runs
            for step in run
            for batch in step.batches
            for key, caption, pixels_CHW in zip(batch.keys, batch.captions, batch.pixels_BCHW, strict=True)
            if batch.counted
        ]

    alone = steps()
    assert [step.sample_count for step in alone] == [3] * 6
    assert summary(steps(first_step=2)) == summary(alone)[2:] and summary(steps(workers=2)) == summary(alone)
    assert sorted(samples(steps(rank=0, world_size=2), steps(rank=1, world_size=2))) == sorted(samples(alone))
    further = {key: variant for key, *variant in samples(alone) if key[2] >= 2}
    assert len(further) == 4 and len({key for key, *_ in samples(alone)}) == 18
    captions = TrainingBatches(pictures, [3], 1, filled={0}).captions(2)
    assert captions == [caption for step in alone for batch in step.batches for caption in batch.captions]


def test_cached_latents_take_the_place_of_pixels(pictures, caplog):
    def encode(pixels_BCHW):
        return pixels_BCHW[:, :, None, ::8, ::8]

    caplog.set_level("INFO")
    cache = cache_latents(pictures, encode, batch_size=3, show_progress=False)
    plain = TrainingBatches(pictures, [2], seed=1).epoch(0)
    cached = TrainingBatches(pictures, [2], seed=1, latents=cache, workers=2).epoch(0)
    assert "no loading processes" in caplog.text
    for expected, step in zip(plain, cached, strict=True):
        (batch,), (pixels,) = step.batches, expected.batches
        assert batch.pixels_BCHW is None and batch.keys == pixels.keys and batch.captions == pixels.captions
        assert torch.equal(batch.latents_BCTHW, encode(pixels.pixels_BCHW))


def test_a_picture_that_went_missing_is_named(pictures):
    pictures[0].path.unlink()
    with pytest.raises(Exception, match=r"p0\.png cannot be read"):
        list(TrainingBatches(pictures, [2], seed=1).epoch(0))


def test_threads_load_the_next_batches_while_one_is_trained(pictures, monkeypatch):
    """Without loading processes: some batches ahead and not the whole epoch."""
    load, loaded = _BatchDataset.__getitem__, []
    monkeypatch.setattr(_BatchDataset, "__getitem__", lambda self, entry: loaded.append(entry) or load(self, entry))
    steps = TrainingBatches(pictures, [1], seed=1).epoch(0)
    next(steps)
    deadline = time.monotonic() + 20
    while len(loaded) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(loaded) == 5
    steps.close()
    assert len(loaded) <= 6


def test_captions_are_announced_before_their_steps(pictures, monkeypatch):
    monkeypatch.setattr(dataset, "_CAPTIONS_AHEAD", 5)
    announced, used = [], []
    loader = TrainingBatches(pictures, [2], seed=1, accumulation=2, announce=announced.append)
    for step in loader.epoch(3, first_step=1):
        used += [caption for batch in step.batches for caption in batch.captions]
        assert [caption for captions in announced for caption in captions][: len(used)] == used
        assert len(announced[-1]) <= 8  # 5, rounded up to whole steps
    assert [caption for captions in announced for caption in captions] == used
    assert 1 < len(announced) < 4
    everything = loader.captions(3)
    assert everything[-len(used) :] == used and len(everything) == 14


@pytest.mark.parametrize(("ahead", "calls"), [(512, 1), (20, 2), (3, 8)])
def test_captions_of_short_epochs_are_announced_several_epochs_at_once(pictures, monkeypatch, ahead, calls):
    """An epoch has 4 steps and 14 captions; the run ends after 9 steps."""
    monkeypatch.setattr(dataset, "_CAPTIONS_AHEAD", ahead)
    announced, used = [], []
    loader = TrainingBatches(pictures, [2], seed=1, accumulation=2, total_steps=9, announce=announced.append)
    for epoch, first_step in ((0, 1), (1, 0), (2, 0)):
        for _, step in zip(range(1 if epoch == 2 else 4), loader.epoch(epoch, first_step), strict=False):
            used += [caption for batch in step.batches for caption in batch.captions]
            assert [caption for captions in announced for caption in captions][: len(used)] == used
    assert [caption for captions in announced for caption in captions] == used
    assert len(announced) == calls


def test_the_number_of_tags_follows_from_the_step_wherever_a_run_goes_on(tmp_path, draw):
    for index in range(4):
        draw(f"p{index}", caption="one, two, three, four")
    subset = SubsetSettings(image_dir=tmp_path, token_warmup_step=0.75)
    dataset = DatasetSettings(resolution=(64, 64), subsets=(subset,))
    pictures = scan_datasets([dataset], skip_broken=False, show_progress=False)

    def counts(epoch, first_step=0, **more):
        steps = TrainingBatches(pictures, [1], seed=1, total_steps=12, **more).epoch(epoch, first_step)
        return [len(caption.split(", ")) for step in steps for batch in step.batches for caption in batch.captions]

    # 1 + floor(step * 3 / 9)
    assert (counts(0), counts(1), counts(2)) == ([1, 1, 1, 2], [2, 2, 3, 3], [3, 4, 4, 4])
    assert counts(1, first_step=2) == [3, 3] == counts(1, workers=1)[2:]
    assert counts(2, rank=1, world_size=2) == [2, 2]  # steps 4 and 5
    assert TrainingBatches(pictures, [1], seed=1).captions(0) == ["one, two, three, four"] * 4


def test_each_rank_announces_its_own_captions(pictures):
    announced = [[], []]
    for rank in (0, 1):
        loader = TrainingBatches(pictures, [2], 1, rank=rank, world_size=2, announce=announced[rank].extend)
        used = [caption for step in loader.epoch(0) for batch in step.batches for caption in batch.captions]
        assert announced[rank] == used == loader.captions(0)
