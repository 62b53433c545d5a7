"""Saving in the background: complete or absent, told when it fails, and never in the way."""

import errno
import threading
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from library.errors import UserError
from library.training.saving.saver import Saver
from library.training.saving.settings import SavingSettings


@pytest.fixture
def settings(tmp_path):
    return SavingSettings(output_dir=tmp_path, output_name="a")


def writer(path, content="x"):
    def write():
        path.write_text(content)
        return [path]

    return write


def failing(error):
    def write():
        raise error

    return write


def test_training_goes_on_while_saves_are_written_in_their_order(settings, tmp_path):
    """Three that fall together wait for one another, and training for none of them."""
    may_end, order = threading.Event(), []

    def slow(name):
        def write():
            assert may_end.wait(10)
            order.append(name)
            return []

        return write

    saver = Saver(settings)
    for name in ("a-best", "a-step00000001", "a-000001"):
        saver.start(name, slow(name))
    order.append("training")
    may_end.set()
    saver.finish()
    assert order == ["training", "a-best", "a-step00000001", "a-000001"]


def test_training_waits_where_copies_would_pile_up(settings):
    may_end, started = threading.Event(), []
    saver = Saver(settings)

    def start_many():
        for number in range(6):
            saver.start(f"a-step{number:08d}", lambda: may_end.wait(10) and [])
            started.append(number)

    training = threading.Thread(target=start_many)
    training.start()
    training.join(0.5)
    assert training.is_alive() and len(started) == 3
    may_end.set()
    training.join(10)
    saver.finish()
    assert len(started) == 6


def test_what_goes_wrong_after_a_save_stops_no_later_one(settings, tmp_path, caplog):
    def broken(written):
        raise RuntimeError("no uploads today")

    saver = Saver(settings, uploader=SimpleNamespace(add=broken, finish=lambda: None))
    for number in range(5):
        saver.start(f"a-step{number:08d}", writer(tmp_path / f"{number}"))
    saver.finish()
    assert len(list(tmp_path.iterdir())) == 5
    assert "after saving a-step00000004: RuntimeError: no uploads today" in caplog.text


def test_what_was_written_is_no_longer_held(settings):
    copies = torch.zeros(3)
    gone = weakref.ref(copies)
    saver = Saver(settings)
    saver.start("a", partial(lambda copies: [], copies))
    del copies
    saver.wait()
    assert gone() is None


def test_a_failed_save_is_told_and_the_next_one_makes_up_for_it(settings, tmp_path, caplog):
    saver = Saver(settings)
    saver.start("a-step00000001", failing(ValueError("what it was")))
    with pytest.raises(UserError, match="saving a-step00000001 failed: ValueError: what it was"):
        saver.finish()
    assert "Earlier saves are as they were" in caplog.text
    saver.start("a-step00000002", writer(tmp_path / "a-step00000002.safetensors"))
    saver.finish()


def test_a_full_disk_is_told_with_what_takes_the_room(settings, tmp_path, caplog):
    (tmp_path / "a-step00000001-state").mkdir()
    (tmp_path / "a-step00000001-state" / "network.safetensors").write_bytes(b"x" * 3 * 2**20)
    (tmp_path / "a-step00000001.safetensors").write_bytes(b"x" * 2**20)
    (tmp_path / "other.safetensors").write_bytes(b"x" * 9 * 2**20)
    saver = Saver(settings)
    saver.start("a-step00000002", failing(OSError(errno.ENOSPC, "No space left on device")))
    saver.wait()
    assert "is full" in caplog.text and "free). Free some room" in caplog.text
    assert "a-step00000001-state (3.0 MiB), a-step00000001.safetensors (1.0 MiB). Earlier" in caplog.text


def test_what_follows_a_save_gets_its_files_and_only_when_it_is_complete(settings, tmp_path):
    seen = []
    saver = Saver(settings, uploader=SimpleNamespace(add=seen.append, finish=lambda: seen.append("finished")))
    saver.start("a-step00000001", failing(OSError(errno.EROFS, "Read-only file system")))
    saver.start("a-step00000002", writer(tmp_path / "a-step00000002.safetensors"))
    saver.finish()
    assert seen == [[tmp_path / "a-step00000002.safetensors"], "finished"]


def test_files_go_only_after_the_new_save_is_complete(tmp_path):
    settings = SavingSettings(output_dir=tmp_path, output_name="a", save_last_n_steps=1)
    (tmp_path / "a-step00000001.safetensors").touch()
    saver = Saver(settings)
    saver.start("a-step00000009", failing(OSError(errno.EIO, "broken")))
    saver.wait()
    assert (tmp_path / "a-step00000001.safetensors").exists()
    saver.start("a-step00000009", writer(tmp_path / "a-step00000009.safetensors"))
    saver.finish()
    assert not (tmp_path / "a-step00000001.safetensors").exists()
