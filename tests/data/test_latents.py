"""The latent caches hold what encoding a picture directly gives, whatever happened to files in between."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from library import tensor_cache
from library.data import latents
from library.data.latent_files import LatentFiles
from library.data.latents import cache_latents, cache_latents_to_disk
from library.data.pictures import scan_datasets
from library.data.pixels import load_pixels
from library.data.settings import DatasetSettings, SubsetSettings
from library.data.team import ALONE, Team
from library.errors import DataError
from library.tensor_cache import TensorCache


def encode(pixels_BCHW):
    """Stands in for the VAE: 8 times smaller, one frame, and different for mirrored pictures."""
    return torch.nn.functional.avg_pool2d(pixels_BCHW, 8).unsqueeze(2).to(torch.bfloat16)


def scanned(tmp_path, side=64):
    straight = SubsetSettings(image_dir=tmp_path / "straight")
    flipped = SubsetSettings(image_dir=tmp_path / "flipped", flip_aug=True)
    dataset = DatasetSettings(
        resolution=(side, side),
        enable_bucket=True,
        min_bucket_reso=32,
        max_bucket_reso=2 * side,
        bucket_reso_steps=32,
        subsets=(straight, flipped),
    )
    return scan_datasets([dataset], skip_broken=False, show_progress=False)


@pytest.fixture
def pictures(tmp_path, draw):
    for index, size in enumerate([(64, 64), (70, 64), (128, 32), (64, 64), (64, 64)]):
        draw(f"straight/{index}", size, "x")
    draw("flipped/0", (64, 64), "x")
    return scanned(tmp_path)


class Encoder:
    """Counts what it encodes."""

    def __init__(self, identity="vae"):
        self.shapes = []
        self.files = LatentFiles(identity)

    def __call__(self, pixels_BCHW):
        self.shapes.append(tuple(pixels_BCHW.shape))
        return encode(pixels_BCHW)

    def cache(self, pictures, batch_size=4, **options):
        """Caches to disk; returns the cache and how many views were encoded."""
        before = sum(shape[0] for shape in self.shapes)
        files = options.pop("files", self.files)
        cache = cache_latents_to_disk(pictures, self, batch_size, files, show_progress=False, **options)
        return cache, sum(shape[0] for shape in self.shapes) - before


def assert_right(cache, pictures):
    views = [
        (picture, flip) for picture in pictures for flip in ((False, True) if picture.subset.flip_aug else (False,))
    ]
    assert set(cache) == {(picture.key, flip) for picture, flip in views} and len(cache) == len(views)
    for picture, flipped in views:
        direct = encode(load_pixels(picture.path, picture.bucket, flipped)[None])[0].float()
        cached = cache[picture.key, flipped]
        assert cached.dtype == torch.float32 and torch.equal(cached, direct)


def latent_files(tmp_path):
    return sorted(tmp_path.rglob("latents/*/*.safetensors"))


def run_as_two_processes(run):
    """run(team) in two threads that stand for processes; their lists are exchanged at a barrier, as all_gather does."""
    barrier, lists, results = threading.Barrier(2), [None, None], [None, None]

    def one(rank):
        def gather(own):
            lists[rank] = own
            barrier.wait(20)
            joined = lists[0] + lists[1]
            barrier.wait(20)
            return joined

        results[rank] = run(Team(rank, 2, gather))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


def test_memory_cache_equals_direct_encoding(pictures):
    encoder = Encoder()
    cache = cache_latents(pictures, encoder, batch_size=4, show_progress=False)
    assert sorted(encoder.shapes) == [(1, 3, 32, 128), (2, 3, 64, 64), (4, 3, 64, 64)]
    assert_right(cache, pictures)
    assert torch.equal(cache["0/1/0.png", True], cache["0/1/0.png", False].flip(3))


def test_disk_cache_equals_direct_encoding_and_is_found_again(pictures, tmp_path):
    encoder = Encoder()
    cache, encoded = encoder.cache(pictures)
    assert encoded == 7 and encoder.shapes[0] == (4, 3, 64, 64)
    assert_right(cache, pictures)
    assert len(latent_files(tmp_path)) == 7
    assert all(".anima_cache" in path.parts for path in latent_files(tmp_path))
    for skip_check in (False, True):
        again, encoded = encoder.cache(pictures, skip_check=skip_check)
        assert encoded == 0
        assert_right(again, pictures)


def test_decoding_and_saving_go_on_beside_the_encoder(pictures, monkeypatch):
    """While it works on one picture, all others are decoded and those before are saved: else it would wait in vain."""
    decoded, saved, encoded = [], [], []
    load, write = latents.load_variant, TensorCache.write

    def loading(picture, variant):
        pixels_CHW = load(picture, variant)
        decoded.append(picture)
        return pixels_CHW

    def writing(cache, key, tensors):
        write(cache, key, tensors)
        saved.append(key)

    def encoding(pixels_BCHW):
        encoded.append(len(pixels_BCHW))
        deadline = time.monotonic() + 20
        while len(decoded) < 7 or len(saved) < len(encoded) - 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return encode(pixels_BCHW)

    monkeypatch.setattr(latents, "load_variant", loading)
    monkeypatch.setattr(TensorCache, "write", writing)
    cache = cache_latents_to_disk(pictures, encoding, 1, LatentFiles("vae"), show_progress=False)
    assert encoded == [1] * 7 and len(saved) == 7
    assert_right(cache, pictures)


def test_processes_share_the_encoding(pictures):
    encoder = Encoder()
    results = run_as_two_processes(lambda team: cache_latents(pictures, encoder, 1, team, show_progress=False))
    assert len(encoder.shapes) == 7
    results += run_as_two_processes(lambda team: encoder.cache(pictures, team=team)[0])
    assert sum(shape[0] for shape in encoder.shapes) == 14
    for cache in results:
        assert_right(cache, pictures)


def test_a_cache_folder_keeps_folders_apart(pictures, tmp_path):
    files = LatentFiles("vae", tmp_path / "elsewhere")
    cache, encoded = Encoder().cache(pictures, files=files)
    assert encoded == 7 and not list(tmp_path.rglob(".anima_cache"))
    assert len([path for path in latent_files(tmp_path) if "elsewhere" in path.parts]) == 7
    assert_right(cache, pictures)


def test_copies_of_a_picture_are_encoded_once(tmp_path, draw):
    shutil.copy(draw("straight/a"), tmp_path / "straight" / "b.png")
    draw("flipped/c")
    pictures = scanned(tmp_path)
    cache, encoded = Encoder().cache(pictures)
    assert encoded == 3
    assert_right(cache, pictures)


def test_a_truncated_file_is_made_anew_at_the_start(pictures, tmp_path):
    encoder = Encoder()
    encoder.cache(pictures)
    broken = latent_files(tmp_path)[2]
    broken.write_bytes(broken.read_bytes()[:-100])
    cache, encoded = encoder.cache(pictures)
    assert encoded == 1
    assert_right(cache, pictures)


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_a_file_damaged_later_is_made_anew_when_read(pictures, tmp_path, caplog, damage):
    encoder = Encoder()
    cache, _ = encoder.cache(pictures, skip_check=True)
    broken = latent_files(tmp_path)[2]
    whole = broken.read_bytes()
    if damage == "gone":
        broken.unlink()
    else:
        broken.write_bytes(whole[:-100] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    cache, encoded = encoder.cache(pictures, skip_check=damage != "changed")
    assert encoded == (damage == "gone")
    assert_right(cache, pictures)
    assert ("missing or damaged: encoding it again" in caplog.text) == (damage != "gone")
    assert torch.equal(load(latent_files(tmp_path)[2].read_bytes())["latents"], load(whole)["latents"])


def test_another_vae_has_latents_of_its_own(pictures):
    first, second = Encoder("one"), Encoder("two")
    assert [first.cache(pictures)[1], second.cache(pictures)[1], first.cache(pictures)[1]] == [7, 7, 0]


def test_resolutions_coexist(pictures, tmp_path):
    encoder = Encoder()
    encoder.cache(pictures)
    larger = scanned(tmp_path, side=128)
    cache, encoded = encoder.cache(larger)
    assert encoded == 7
    assert_right(cache, larger)
    cache, encoded = encoder.cache(pictures)
    assert encoded == 0
    assert_right(cache, pictures)


def test_a_mirrored_picture_is_added_when_flip_aug_is_turned_on(tmp_path, draw):
    draw("straight/a")
    draw("flipped/b")
    encoder = Encoder()
    encoder.cache([picture for picture in scanned(tmp_path) if not picture.subset.flip_aug])
    shutil.copy(tmp_path / "straight" / "a.png", tmp_path / "flipped" / "a.png")
    pictures = scanned(tmp_path)
    cache, encoded = encoder.cache(pictures)
    assert encoded == 4
    assert_right(cache, pictures)


@pytest.mark.parametrize("skip_check", [False, True])
def test_a_changed_picture_of_the_same_name_is_encoded_anew(pictures, skip_check):
    encoder = Encoder()
    encoder.cache(pictures)
    Image.fromarray(np.full((64, 64, 3), 77, np.uint8)).save(pictures[0].path)
    cache, encoded = encoder.cache(pictures, skip_check=skip_check)
    assert encoded == 1
    assert_right(cache, pictures)
    assert cache[pictures[0].key, False].unique().tolist() == [torch.tensor(77 / 127.5 - 1).bfloat16().float().item()]


def test_two_runs_at_once_do_not_disturb_each_other(pictures):
    caches = []
    runs = [
        threading.Thread(target=lambda: caches.append(Encoder().cache(pictures, batch_size=1)[0])) for _ in range(2)
    ]
    [run.start() for run in runs]
    [run.join() for run in runs]
    assert len(caches) == 2
    for cache in caches:
        assert_right(cache, pictures)
    assert Encoder().cache(pictures)[1] == 0


def test_a_full_disk_is_told_and_what_was_written_is_kept(pictures, tmp_path, monkeypatch):
    encoder, written, write = Encoder(), [], tensor_cache.write_atomically

    def full_after_three(path, writer):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        write(path, writer)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_cache, "write_atomically", full_after_three)
        with pytest.raises(DataError, match=r"latents: No space left on device. Free some space or set cache_dir"):
            encoder.cache(pictures)
    assert len(latent_files(tmp_path)) == 3
    cache, encoded = encoder.cache(pictures)
    assert encoded == 4
    assert_right(cache, pictures)


def test_a_lost_picture_is_named(pictures):
    pictures[3].path.unlink()
    for run in (Encoder().cache, lambda views: cache_latents(views, encode, 1, ALONE, show_progress=False)):
        with pytest.raises(DataError, match=r"3\.png cannot be read"):
            run(pictures)


def test_caches_of_other_trainers_are_told_and_left_alone(pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    np.savez(tmp_path / "straight" / "0_0064x0064_anima.npz", latents=np.zeros((3, 8, 8)))
    cache, _ = Encoder().cache(pictures)
    assert_right(cache, pictures)
    assert caplog.text.count("latents cached by other trainers (.npz)") == 1


def test_what_no_picture_uses_can_be_deleted(pictures, tmp_path):
    encoder = Encoder()
    Encoder("other").cache(pictures)
    encoder.cache(pictures)
    Image.fromarray(np.full((64, 64, 3), 77, np.uint8)).save(pictures[0].path)
    cache, encoded = encoder.cache(pictures)
    assert encoded == 1 and len(latent_files(tmp_path)) == 7 + 7 + 1
    assert cache.remove_others() == 8 and len(latent_files(tmp_path)) == 7
    assert_right(cache, pictures)
    assert encoder.cache(pictures)[1] == 0


def test_a_picture_changed_during_the_run_gets_into_no_cache(pictures, tmp_path):
    """Its file would bear the old picture's name."""
    cache, _ = Encoder().cache(pictures)
    Image.fromarray(np.full((64, 64, 3), 77, np.uint8)).save(pictures[0].path)
    assert cache[pictures[0].key, False] is not None  # what the run began with
    for path in latent_files(tmp_path):
        path.unlink()
    with pytest.raises(DataError, match=r"0\.png has changed since this run began: start it again"):
        cache[pictures[0].key, False]
    assert latent_files(tmp_path) == []
