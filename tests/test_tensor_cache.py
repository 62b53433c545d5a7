"""Entries come back as they were written, or count as missing."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch

from library.tensor_cache import TensorCache, cache_key, identity_of

KEY, OTHER = cache_key("a"), cache_key("b")


@pytest.fixture
def entry():
    return {"states": torch.randn(5, 3).to(torch.bfloat16), "ids": torch.tensor([7, 8, 1])}


@pytest.fixture
def cache(tmp_path, entry):
    cache = TensorCache(tmp_path)
    cache.write(KEY, entry)
    return cache


def file_of(cache, key=KEY):
    return cache.folder / key[:2] / f"{key}.safetensors"


def test_entries_come_back_bit_for_bit(cache, entry):
    again = TensorCache(cache.folder)
    read = again.read(KEY)
    assert read.keys() == entry.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in entry.items())
    assert again.holds(KEY) and again.keys() == {KEY}
    assert again.read(OTHER) is None and not again.holds(OTHER)
    again.remove(KEY)
    assert again.keys() == set() and again.read(KEY) is None
    assert TensorCache(cache.folder / "none").keys() == set()


def test_every_truncation_is_noticed(cache):
    whole = file_of(cache).read_bytes()
    for length in range(len(whole)):
        file_of(cache).write_bytes(whole[:length])
        assert cache.read(KEY) is None and not cache.holds(KEY), length


def test_every_changed_byte_is_noticed_when_read(cache):
    whole = file_of(cache).read_bytes()
    entry = cache.read(KEY)
    for place in range(len(whole)):
        file_of(cache).write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        cache.holds(KEY)  # must not fail, whatever it says
        assert cache.read(KEY) is None, place
    file_of(cache).write_bytes(whole)
    assert torch.equal(cache.read(KEY)["states"], entry["states"])


def test_an_entry_under_another_name_is_not_taken(cache):
    file_of(cache, OTHER).parent.mkdir(exist_ok=True)
    shutil.copy(file_of(cache), file_of(cache, OTHER))
    assert cache.read(OTHER) is None and not cache.holds(OTHER)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{}", b"\1" * 9])
def test_other_files_are_not_taken(cache, content):
    file_of(cache).write_bytes(content)
    assert cache.read(KEY) is None and not cache.holds(KEY)


def test_a_failed_write_leaves_nothing(cache, entry, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write(OTHER, entry)
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == [file_of(cache)]


def test_the_limit_drops_what_was_unused_for_longest(tmp_path):
    keys = [cache_key(str(number)) for number in range(5)]
    entry = {"x": torch.zeros(1000)}
    plain = TensorCache(tmp_path)
    for age, key in enumerate(keys[:3]):
        plain.write(key, entry)
        os.utime(file_of(plain, key), (1000 + age, 1000 + age))
    size = file_of(plain, keys[0]).stat().st_size
    cache = TensorCache(tmp_path, limit=3 * size)
    assert cache.read(keys[0]) is not None  # used now, so 1 is the oldest
    cache.write(keys[3], entry)
    assert cache.keys() == {keys[0], keys[2], keys[3]}
    cache.write(keys[3], entry)
    cache.write(keys[4], entry)
    assert cache.keys() == {keys[0], keys[3], keys[4]}
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 3 * size


def test_what_an_earlier_run_read_is_kept_longer(tmp_path):
    keys = [cache_key(str(number)) for number in range(3)]
    entry = {"x": torch.zeros(1000)}
    cache = TensorCache(tmp_path, limit=2**20)
    for age, key in enumerate(keys):
        cache.write(key, entry)
        os.utime(file_of(cache, key), (1000 + age, 1000 + age))
    assert cache.read(keys[0]) is not None
    size = file_of(cache, keys[0]).stat().st_size
    TensorCache(tmp_path, limit=3 * size).write(cache_key("new"), entry)
    assert TensorCache(tmp_path).keys() == {keys[0], keys[2], cache_key("new")}


def test_the_identity_of_a_module_follows_its_tensors():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = identity_of(module)
    assert before == identity_of(module) and len(before) == 32
    seen = {before, identity_of(module.to(torch.bfloat16)), identity_of(torch.nn.ModuleList(module))}
    with torch.no_grad():
        module[0].bias[3] += 1
    seen.add(identity_of(module))
    module[1].running_mean[0] = 5
    seen.add(identity_of(module))
    assert len(seen) == 4  # a list of the same modules spells the same names
