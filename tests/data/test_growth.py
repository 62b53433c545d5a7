"""Starting takes time in proportion to the pictures: 100,000 whose latents lie on disk are ready in 30 s."""

from __future__ import annotations

import io
import logging
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from library.data import picture_index
from library.data.dataset import TrainingBatches
from library.data.epochs import bucket_table, steps_per_epoch
from library.data.latent_files import LatentFiles, View
from library.data.latents import cache_latents_to_disk
from library.data.picture_index import PictureIndex
from library.data.pictures import scan_datasets
from library.data.settings import DatasetSettings, SubsetSettings
from library.data.summary import describe_data
from library.data.team import ALONE
from library.tensor_cache import _checksum, _header

slow = pytest.mark.slow
SIZES = ((32, 32), (48, 32), (32, 48), (64, 32))
BATCH = 4


def never(pixels_BCHW):
    raise AssertionError("a picture was encoded again")


@pytest.mark.parametrize("count", [100, 1000, pytest.param(10_000, marks=slow), pytest.param(100_000, marks=slow)])
def test_starts_are_linear(tmp_path, monkeypatch, count):
    """In processor time, which other work on the machine does not lengthen; --log-cli-level=INFO shows the numbers.

    The cold start reads and hashes the pictures; latents are written by hand, as 100,000 that wait for the disk one by
    one take longer to write than to test.
    """
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(picture_index, "_TOO_YOUNG_NS", -1)
    draw_pictures(tmp_path, count)
    dataset = DatasetSettings(
        resolution=(32, 32), batch_size=BATCH, enable_bucket=True, min_bucket_reso=16, max_bucket_reso=64,
        bucket_reso_steps=16, subsets=(SubsetSettings(image_dir=tmp_path, shuffle_caption=True),),
    )  # fmt: skip
    files = LatentFiles("vae")

    measured = Measured(count)
    pictures = planned(dataset)
    views = [View(picture, False) for picture in pictures]
    located = files.locate(views, False, ALONE, False)
    measured.tell("cold, nothing encoded")
    write_latents(located)

    for skip_check in (False, True):
        measured = Measured(count)
        pictures = planned(dataset, skip_check)
        cache = cache_latents_to_disk(pictures, never, 1, files, skip_check, show_progress=False)
        batches = TrainingBatches(pictures, [BATCH], 0, latents=cache).epoch(0)
        next(batches)
        seconds = measured.tell(f"warm, skip_cache_check {skip_check}")
        assert len(cache) == count == len(pictures)
        assert seconds < max(1, count * 30 / 100_000)

    measured, steps = Measured(count), 0
    for _, step in zip(range(1000), batches, strict=False):
        assert step.batches[0].latents_BCTHW.shape[1:] == (16, 1, 4, 4)
        steps += 1
    measured.tell(f"{steps} batches")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logging.info("%d pictures: peak memory %.2f GiB", count, peak / 2**30)
    assert peak < 1.5e9


class Measured:
    """Processor and clock seconds since it was made."""

    def __init__(self, count):
        self.count, self.cpu, self.clock = count, time.process_time(), time.perf_counter()

    def tell(self, what):
        cpu, clock = time.process_time() - self.cpu, time.perf_counter() - self.clock
        logging.info("%d pictures, %s: %.2f s of processor time, %.2f s", self.count, what, cpu, clock)
        return cpu


def draw_pictures(folder, count):
    """Fifty different pictures, each many times, with a caption of its own."""
    random, contents = np.random.default_rng(0), []
    for number in range(50):
        width, height = SIZES[number % len(SIZES)]
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
        contents.append(buffer.getvalue() + b"%d" % number)
    for index in range(count):
        (folder / f"{index:06}.png").write_bytes(contents[index % len(contents)] + b"%d" % index)
        (folder / f"{index:06}.txt").write_text(f"1girl, solo, tag {index % 997}, tag {index % 37}, number {index}")


def planned(dataset, trust_times=False):
    """What a run does with its pictures before models are loaded, and to describe them."""
    pictures = scan_datasets([dataset], False, False, PictureIndex(trust_times=trust_times))
    steps_per_epoch(pictures, [BATCH], 1, 1)
    bucket_table(pictures, [BATCH])
    describe_data([dataset], pictures)
    return pictures


def write_latents(located):
    content = {"latents": torch.zeros(16, 1, 4, 4)}
    plain = save(content)
    checksum = _checksum(plain[_header(plain)[1] :])
    for file in located:
        path = file.cache._path(file.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(content, {"key": file.key, "checksum": checksum}))
