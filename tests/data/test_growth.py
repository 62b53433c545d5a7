"""A warm start takes time in proportion to the pictures: 100,000 whose latents lie on disk are ready in 30 s."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from safetensors.torch import save

from library.data import picture_index
from library.data.latent_files import LatentFiles, View
from library.data.latents import cache_latents_to_disk
from library.data.pictures import Picture
from library.data.settings import SubsetSettings
from library.data.team import ALONE
from library.tensor_cache import _checksum, _header

slow = pytest.mark.slow


def never(pixels_BCHW):
    raise AssertionError("a picture was encoded again")


@pytest.mark.parametrize("count", [100, 1000, pytest.param(10_000, marks=slow), pytest.param(100_000, marks=slow)])
def test_a_warm_start_is_linear(tmp_path, monkeypatch, count):
    """In processor time, which other work on the machine does not lengthen.

    Files are filled by hand: 100,000 that wait for the disk one by one take longer to write than to test.
    """
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(picture_index, "_TOO_YOUNG_NS", -1)
    subset = SubsetSettings(image_dir=tmp_path)
    pictures = []
    for index in range(count):
        path = tmp_path / f"{index:06}.png"
        path.write_bytes(b"%d" % index)
        pictures.append(_picture(path, subset))
    files, content = LatentFiles("vae"), {"latents": torch.zeros(16, 1, 4, 4)}
    plain = save(content)
    checksum = _checksum(plain[_header(plain)[1] :])
    for file in files.locate([View(picture, False) for picture in pictures], False, ALONE, False):
        path = file.cache._path(file.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(content, {"key": file.key, "checksum": checksum}))

    for skip_check in (False, True):
        started = time.process_time()
        cache = cache_latents_to_disk(pictures, never, 1, files, skip_check, show_progress=False)
        seconds = time.process_time() - started
        logging.info("%d pictures, skip_cache_check %s: %.2f s", count, skip_check, seconds)  # shown by --log-cli-level
        assert len(cache) == count and cache[pictures[-1].key, False].shape == (16, 1, 4, 4)
        assert seconds < 1 + count * 30 / 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.5 * 2**20  # KiB


def _picture(path, subset):
    return Picture(
        key=f"0/0/{path.name}", path=path, caption="", size=(32, 32), bucket=(32, 32), dataset=0, subset=subset
    )
