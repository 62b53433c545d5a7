"""The stream of samples, whatever the pictures, batches, processes and the step that a run goes on from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.dataset import TrainingBatches
from library.data.pictures import Picture, scan_datasets
from library.data.settings import DatasetSettings, SubsetSettings

VARIED = {
    "shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "caption_dropout_rate": 0.1, "flip_aug": True,
    "keep_tokens": 1,
}  # fmt: skip


class Latents(dict):
    """Stands for a cache: each picture's latents hold its number, negative where it is mirrored."""

    def __missing__(self, key):
        name, flipped = key
        number = float(name.rpartition("/")[2]) + 1
        return torch.full((1, 1, 2, 2), -number if flipped else number)


def picture(index, dataset, bucket, repeats):
    subset = SubsetSettings(num_repeats=repeats, **VARIED)
    caption = ", ".join(f"tag{index}.{number}" for number in range(6))
    return Picture(f"{dataset}/0/{index}", Path(f"{index}.png"), caption, bucket, bucket, dataset, subset)


rows = st.tuples(st.integers(0, 1), st.sampled_from([(64, 64), (64, 128), (128, 64)]), st.integers(1, 3))
runs = st.fixed_dictionaries(
    {
        "pictures": st.lists(rows, min_size=1, max_size=15).map(
            lambda found: [picture(index, *row) for index, row in enumerate(found)]
        ),
        "batch_sizes": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "accumulation": st.integers(1, 3),
        "filled": st.sets(st.integers(0, 1)),
    }
)


def stream(run, epoch, seed=1, rank=0, world_size=1, first_step=0, workers=0):
    """[[(key, caption, latent), …] of each step], of the samples that count."""
    batches = TrainingBatches(
        run["pictures"], run["batch_sizes"], seed, accumulation=run["accumulation"], rank=rank, world_size=world_size,
        latents=Latents(), workers=workers, filled=run["filled"],
    )  # fmt: skip
    return [
        [
            (key, caption, latents_CTHW.mean().item())
            for batch in step.batches
            if batch.counted
            for key, caption, latents_CTHW in zip(batch.keys, batch.captions, batch.latents_BCTHW, strict=True)
        ]
        for step in batches.epoch(epoch, first_step)
    ]


@settings(max_examples=60, deadline=None)
@given(run=runs, epoch=st.integers(0, 2), world_size=st.integers(1, 3), data=st.data())
def test_every_use_comes_once_and_is_the_same_on_any_process_and_after_any_resume(run, epoch, world_size, data):
    alone = stream(run, epoch)
    uses = Counter(key for step in alone for key, *_ in step)
    expected = {(epoch, each.key, repeat) for each in run["pictures"] for repeat in range(each.subset.num_repeats)}
    assert set(uses.values()) == {1} and uses.keys() >= expected
    assert run["filled"] or uses.keys() == expected
    first_step = data.draw(st.integers(0, len(alone)))
    assert stream(run, epoch, first_step=first_step) == alone[first_step:]
    ranks = [stream(run, epoch, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len(set(map(len, ranks))) == 1
    samples = [sample for steps in ranks for step in steps for sample in step]
    assert sorted(samples) == sorted(sample for step in alone for sample in step)


@settings(max_examples=30, deadline=None)
@given(run=runs, epoch=st.integers(0, 2))
def test_protected_tags_stay_and_another_seed_gives_another_stream(run, epoch):
    streams = [stream(run, epoch, seed) for seed in (1, 1, 2, 3, 4)]
    assert streams[0] == streams[1]
    assert any(other != streams[0] for other in streams[2:])
    for key, caption, latent in (sample for step in streams[0] for sample in step):
        number = int(key[1].rpartition("/")[2])
        tags = caption.split(", ") if caption else []
        assert not tags or tags[0] == f"tag{number}.0"
        assert set(tags) <= {f"tag{number}.{index}" for index in range(6)} and abs(latent) == number + 1


@pytest.mark.parametrize("workers", [1, 8])
def test_loading_processes_change_nothing(tmp_path, draw, workers):
    """Without a cache, as cached latents need none."""
    for number in range(9):
        draw(f"{number}", (32, 32) if number % 2 else (48, 32), ", ".join(f"tag{index}" for index in range(6)))
    subset = SubsetSettings(image_dir=tmp_path, num_repeats=2, random_crop=True, color_aug=True, **VARIED)
    pictures = scan_datasets([DatasetSettings(resolution=(32, 32), subsets=(subset,))], False, show_progress=False)

    def samples(workers):
        batches = TrainingBatches(pictures, [2], 1, workers=workers, accumulation=2)
        return [(b.keys, b.captions, b.pixels_BCHW.sum().item()) for step in batches.epoch(1) for b in step.batches]

    assert samples(workers) == samples(0)
