"""Unchanged pictures are not read again, and changed ones always are."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest

from library.data import picture_hashes, picture_index
from library.data.picture_hashes import hash_pictures
from library.data.picture_index import PictureIndex
from library.data.team import ALONE, Team
from library.errors import DataError


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read."""
    names = []
    original = picture_hashes.hash_picture
    monkeypatch.setattr(picture_hashes, "hash_picture", lambda path: names.append(path.name) or original(path))
    return names


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files that count as old enough."""
    monkeypatch.setattr(picture_index, "_TOO_YOUNG_NS", -1)
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 100)
    return [tmp_path / name for name in "abc"]


def hashed(files, trust_times=False, team=ALONE):
    index = PictureIndex(trust_times=trust_times, writes=team.rank == 0)
    return hash_pictures(files, index, team, show_progress=False)


def test_a_second_start_reads_nothing(files, read):
    first = hashed(files)
    assert sorted(read) == ["a", "b", "c"] and len(set(first.values())) == 3
    read.clear()
    assert hashed(files) == first == hashed(files, trust_times=True) and read == []


def test_same_content_has_the_same_hash(files, tmp_path):
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    hashes = hashed(files)
    assert hashes[tmp_path / "a"] == hashes[tmp_path / "b"] != hashes[tmp_path / "c"]


def test_a_changed_file_is_read_again(files, read, tmp_path):
    first = hashed(files)
    read.clear()
    (tmp_path / "b").write_bytes(b"x" * 100)  # as long as before
    second = hashed(files)
    assert read == ["b"] and second[tmp_path / "b"] != first[tmp_path / "b"]


def test_a_replaced_file_with_the_old_time_is_noticed_unless_times_are_trusted(files, read, tmp_path):
    first, path = hashed(files), tmp_path / "b"
    status = path.stat()
    time.sleep(0.05)
    path.write_bytes(b"x" * 100)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    read.clear()
    assert hashed(files, trust_times=True) == first and read == []
    assert hashed(files)[path] != first[path] and read == ["b"]


def test_files_changed_a_moment_ago_are_not_remembered(files, read, monkeypatch):
    monkeypatch.setattr(picture_index, "_TOO_YOUNG_NS", 10**12)
    hashed(files)
    read.clear()
    hashed(files)
    assert sorted(read) == ["a", "b", "c"]


@pytest.mark.parametrize("content", ["", "[1]", '{"version": 2, "pictures": [', '{"version": 2, "pictures": {"a": 5}}'])
def test_a_damaged_index_is_made_anew(files, read, tmp_path, content):
    first = hashed(files)
    (tmp_path / ".anima_cache" / "pictures.json").write_text(content)
    read.clear()
    assert hashed(files) == first and sorted(read) == ["a", "b", "c"]
    read.clear()
    assert hashed(files) == first and read == []


def test_processes_share_the_reading(files, read, tmp_path):
    """Two threads stand for two processes; their lists are exchanged at a barrier, as all_gather does."""
    barrier, lists, results = threading.Barrier(2), [None, None], [None, None]

    def run(rank):
        def gather(own):
            lists[rank] = own
            barrier.wait(10)
            joined = lists[0] + lists[1]
            barrier.wait(10)
            return joined

        results[rank] = hashed(files, team=Team(rank, 2, gather))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results[0] == results[1] and len(results[0]) == 3
    assert sorted(read) == ["a", "b", "c"]
    read.clear()
    assert hashed(files) == results[0] and read == []


def test_what_cannot_be_read_or_written_is_named(files, tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(picture_index, "write_atomically", full)
        with pytest.raises(DataError, match=r"anima_cache: No space left on device. Free some space or set cache_dir"):
            hashed(files)
    (tmp_path / "b").unlink()
    with pytest.raises(DataError, match=r"picture .*/b cannot be read"):
        hashed(files)
