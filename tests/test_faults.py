"""Harm done to runs in processes of their own: each goes on to the exact result, or stops with a clear message.

docs/reliability.md lists what is done here and what was measured.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file

from anima_train_network import AnimaNetworkTrainer
from library import files
from library.data import dataset
from library.training import interrupts
from library.training.saving.checked_files import damage_of
from tests.training_runs import TrainingRun, tensor_bytes
from train_network import NetworkTrainer

logger = logging.getLogger(__name__)

STEPS = 8
FEW_SAMPLES = {"sample_every_n_steps": 100}
UNCACHED = {
    "cache_latents": False, "cache_latents_to_disk": False, "max_data_loader_n_workers": 1, "max_train_steps": 5,
    **FEW_SAMPLES,
}  # fmt: skip


@pytest.fixture
def words(config, tmp_path):
    """words(**settings) -> those of a run that saves each step, caches to disk, samples, and draws all it can."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square --w 32 --h 32 --s 1 --d 5\n", encoding="utf-8")

    def make(**settings) -> list[str]:
        common = {
            "max_train_steps": STEPS, "save_every_n_steps": 1, "save_state": True, "log_with": "none",
            "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "cache_dir": tmp_path / "cache",
            "sample_prompts": prompts, "sample_every_n_steps": 3, "sample_at_first": True, "learning_rate": 1e-2,
            "network_dropout": 0.1, "lr_scheduler": "cosine",
        }  # fmt: skip
        option, file = config(**{**common, **settings})
        return [option, str(Path(file).rename(tmp_path / f"{time.monotonic_ns()}.toml"))]  # the next has the same name

    return make


@pytest.fixture(scope="module")
def known() -> dict[str, tuple[bytes, float]]:
    """What undisturbed runs have ended with, by their settings."""
    return {}


@pytest.fixture
def undisturbed(words, tmp_path, known):
    """undisturbed(**settings) -> the tensors that a run ends with when nothing happens to it, and its seconds."""

    def ended(**settings) -> tuple[bytes, float]:
        key = json.dumps(settings)
        if key not in known:
            folders = {"output_dir": tmp_path / "undisturbed", "cache_dir": tmp_path / "other_cache"}
            run = TrainingRun(words(**folders, **settings), tmp_path / "undisturbed.log")
            run.wait_for("\n")  # the server that runs are forked from takes seconds to start
            started = time.monotonic()
            assert run.end() == 0, run.output
            known[key] = tensor_bytes(tmp_path / "undisturbed" / "tiny.safetensors"), time.monotonic() - started
        return known[key]

    return ended


def result(tmp_path: Path) -> bytes:
    return tensor_bytes(tmp_path / "output" / "tiny.safetensors")


def started(words: list[str], tmp_path: Path, prepare=None) -> TrainingRun:
    """The run, from its last state where it has one."""
    state = max((tmp_path / "output").glob("tiny-step*-state"), default=None)
    resume = [] if state is None else ["--resume", str(state)]
    return TrainingRun([*words, *resume], tmp_path / "log", prepare)


def ended_exactly(words: list[str], tmp_path: Path, expected: bytes) -> None:
    """The run goes on from its last state, and ends with the tensors of the undisturbed one."""
    run = started(words, tmp_path)
    assert run.end() == 0, run.output
    assert "resumed from" in run.output
    assert result(tmp_path) == expected


def check_all_is_whole(output: Path) -> None:
    """What lies in a folder under a final name can be read to its end; hidden names are of what was being written."""
    for path in output.glob("[!.]*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    for folder in output.glob("[!.]*-state"):
        assert (folder / "manifest.json").is_file()
        assert damage_of(folder) is None, folder
    for path in output.glob("sample/[!.]*.png"):
        with Image.open(path) as picture:
            picture.load()


def states_of(output: Path) -> list[int]:
    return sorted(int(path.name[9:17]) for path in output.glob("tiny-step*-state"))


def kill_repeatedly(words: list[str], tmp_path: Path, kills: int, expected: bytes, seconds: float) -> Counter[str]:
    """Runs that are killed and go on, killed and go on, until they end; then a new one. Returns when they were killed.

    seconds: how long an undisturbed run takes.
    """
    random_of_kills, output, phases = random.Random(kills), tmp_path / "output", Counter()
    while phases.total() < kills:
        run = started(words, tmp_path)
        if run.end_within(random_of_kills.uniform(0, seconds)):
            assert result(tmp_path) == expected
            shutil.rmtree(output)
            shutil.rmtree(tmp_path / "cache")
            continue
        phases[phase_of(run.output)] += 1
        logger.info("kill %d while %s", phases.total(), phase_of(run.output))
        check_all_is_whole(output)
        told = [int(step) for step in re.findall(r"saved \S+tiny-step(\d+)-state", run.output)]
        assert set(told) <= set(states_of(output)), "a state that was told to be saved is lost"
    run = started(words, tmp_path)
    assert run.end() == 0, run.output
    assert result(tmp_path) == expected
    return phases


def phase_of(output: str) -> str:
    """What a run was doing by the last of its words."""
    words = {"steps:": "training", "saved": "training", "sample:": "sampling", "caching latents": "caching"}
    found = {phase: output.rfind(word) for word, phase in words.items()}
    last = max(found, key=found.__getitem__)
    return last if found[last] >= 0 else "starting"


def test_a_run_survives_5_kills(words, tmp_path, undisturbed):
    kill_repeatedly(words(), tmp_path, 5, *undisturbed())


@pytest.mark.slow
def test_a_run_survives_50_kills(words, tmp_path, undisturbed):
    logger.info("killed while %s", dict(kill_repeatedly(words(), tmp_path, 50, *undisturbed())))


def killed_while_writing(pattern: str, number: int) -> None:
    """Kills the process in the midst of a write: that many files of matching paths have been written, or nearly."""
    sync, left = files._sync_file, [number]

    def deadly(path):
        if re.search(pattern, str(path)):
            left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    files._sync_file = deadly


def killed_between_renames() -> None:
    """Kills the process when a state is about to take the place of one of the same name, which was moved aside."""
    replace = files._replace_folder

    def deadly(new, path):
        if path.exists():
            path.replace(path.with_name(f".{path.name}.{os.getpid()}.old"))
            os.kill(os.getpid(), signal.SIGKILL)
        replace(new, path)

    files._replace_folder = deadly


# What was being written, and how much of it is there already.
WRITES = {
    "the first latents": (r"latents/", 1),
    "the last latents": (r"latents/", 4),
    "captions": (r"text/", 1),
    "a picture of the base model": (r"sample/\.tiny_base", 1),
    "an adapter": (r"\.tiny-step\d+\.[-\w]+\.tmp\.safetensors", 1),
    "a state's first file": (r"-state\.\d+\.tmp/", 1),
    "a state's last file": (r"-state\.\d+\.tmp/", 8),
    "a later adapter": (r"\.tiny-step\d+\.[-\w]+\.tmp\.safetensors", 2),
    "the sheet of samples over time": (r"sample/\.tiny_grid", 1),
    "the last adapter": (r"/\.tiny\.[-\w]+\.tmp\.safetensors", 1),
}


def test_a_run_survives_kills_in_the_midst_of_each_kind_of_write(words, tmp_path, undisturbed):
    """One run, killed ten times and resumed each time from the last state, where there is one."""
    output = tmp_path / "output"
    for what, (pattern, number) in WRITES.items():
        before = states_of(output)
        run = started(words(), tmp_path, partial(killed_while_writing, pattern, number))
        assert run.end() == -signal.SIGKILL, f"not killed while writing {what}:\n{run.output}"
        check_all_is_whole(output)
        assert set(before) <= set(states_of(output)), what
    ended_exactly(words(), tmp_path, undisturbed()[0])
    assert not [path.name for path in output.rglob(".*")], "what killed runs left behind is still there"


def test_a_state_that_is_to_be_replaced_survives_a_kill_between_the_two_renames(words, tmp_path, undisturbed):
    """As when a run goes on from an earlier state and saves again under the same names."""
    run = started(words(), tmp_path)
    assert run.end() == 0, run.output
    first = tmp_path / "output" / "tiny-step00000001-state"
    again = TrainingRun([*words(), "--resume", str(first)], tmp_path / "log", killed_between_renames)
    assert again.end() == -signal.SIGKILL, again.output
    check_all_is_whole(tmp_path / "output")
    ended_exactly(words(), tmp_path, undisturbed()[0])
    assert states_of(tmp_path / "output") == list(range(1, STEPS))


def killed_within_a_step() -> None:
    """Kills the process between the second and the third batch of the fourth step."""
    add_gradients, batches = NetworkTrainer.add_gradients, [0]

    def deadly(self, batch, share):
        batches[0] += self.state.step == 3
        if batches[0] == 3:
            self.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return add_gradients(self, batch, share)

    NetworkTrainer.add_gradients = deadly


def test_a_step_that_was_killed_among_its_batches_is_done_again_whole(words, tmp_path, undisturbed):
    settings = {"train_batch_size": 1, "gradient_accumulation_steps": 3, "max_train_steps": 5, **FEW_SAMPLES}
    run = started(words(**settings), tmp_path, killed_within_a_step)
    run.wait_for("tiny-step00000003-state")
    assert run.end() == -signal.SIGKILL, run.output
    ended_exactly(words(**settings), tmp_path, undisturbed(**settings)[0])


def test_sigterm_saves_and_the_run_can_go_on(words, tmp_path, undisturbed):
    words = words(save_state=False, save_every_n_steps=100)
    run = started(words, tmp_path)
    run.wait_for("tiny_000003_00")  # the sample picture after the third step
    run.send(signal.SIGTERM)
    assert run.end() == 130
    assert re.search(r'stopped at step \d of 8; go on with --resume "', run.output)
    assert len(states_of(tmp_path / "output")) == 1
    ended_exactly(words, tmp_path, undisturbed()[0])


def slow_steps() -> None:
    """Steps take so long that two signals come during one, and of these the second counts at once."""
    interrupts._ECHO_SECONDS = 0.0
    step = NetworkTrainer.step

    def slow(self, *arguments):
        time.sleep(1)
        return step(self, *arguments)

    NetworkTrainer.step = slow


def test_a_second_ctrl_c_ends_at_once_and_nothing_saved_is_lost(words, tmp_path, undisturbed):
    run = started(words(), tmp_path, slow_steps)
    run.wait_for("tiny-step00000002-state")
    run.send(signal.SIGINT)
    run.wait_for("once more, later, stops at once")
    run.send(signal.SIGINT)
    assert run.end() == 130
    assert "stopped at once: what was not saved by then is lost" in run.output
    assert states_of(tmp_path / "output") == [1, 2]
    check_all_is_whole(tmp_path / "output")
    ended_exactly(words(), tmp_path, undisturbed()[0])


def full_disk() -> None:
    """Writes fail while a file named full lies in the folder that is the output's parent."""
    sync = files._sync_file

    def failing(path):
        if any((folder / "full").exists() for folder in path.parents):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    files._sync_file = failing


def test_a_full_disk_keeps_the_last_save_and_training_goes_on_when_there_is_room(words, tmp_path, undisturbed):
    output = tmp_path / "output"
    run = started(words(**FEW_SAMPLES), tmp_path, full_disk)
    run.wait_for("tiny-step00000002-state")
    (output / "full").touch()
    run.wait_for("failed: the disk of")
    (output / "full").unlink()
    assert run.end() == 0, run.output
    assert "Free some room there, for instance by moving away the largest saves: tiny-step" in run.output
    assert states_of(output)[:2] == [1, 2]
    assert len(states_of(output)) < STEPS - 1
    check_all_is_whole(output)
    assert result(tmp_path) == undisturbed()[0]


def test_a_disk_that_stays_full_ends_the_run_with_a_message(words, tmp_path, undisturbed):
    output = tmp_path / "output"
    run = started(words(**FEW_SAMPLES), tmp_path, full_disk)
    run.wait_for("tiny-step00000002-state")
    (output / "full").touch()
    assert run.end() == 1
    assert "error: saving tiny failed: the disk of" in run.output
    assert "Traceback" not in run.output
    assert not (output / "tiny.safetensors").exists()
    check_all_is_whole(output)
    (output / "full").unlink()
    ended_exactly(words(), tmp_path, undisturbed()[0])


@pytest.fixture
def mounted(tmp_path) -> Iterator[Path]:
    """The run's output folder on a disk of its own, of 8 MiB; skips where that needs rights that are not there."""
    output = tmp_path / "output"
    output.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(output)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a disk can be mounted by root only")
    yield output
    subprocess.run(["umount", "--lazy", str(output)], check=True)


@pytest.mark.slow
def test_a_small_disk_that_fills_up(words, tmp_path, mounted, undisturbed):
    run = started(words(**FEW_SAMPLES), tmp_path)
    run.wait_for("tiny-step00000002-state")
    with pytest.raises(OSError, match="No space left"), (mounted / "filling").open("wb") as filling:
        while True:
            filling.write(bytes(4096))
            filling.flush()
    assert run.end() == 1
    assert "error: saving tiny failed: the disk of" in run.output
    assert "Traceback" not in run.output
    check_all_is_whole(mounted)
    (mounted / "filling").unlink()
    ended_exactly(words(), tmp_path, undisturbed()[0])


@pytest.mark.slow
def test_an_output_folder_that_becomes_read_only(words, tmp_path, mounted, undisturbed):
    run = started(words(**FEW_SAMPLES), tmp_path)
    run.wait_for("tiny-step00000002-state")
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    assert run.end() == 1
    assert "Read-only file system" in run.output
    assert "Traceback" not in run.output
    check_all_is_whole(mounted)
    again = started(words(), tmp_path)
    assert again.end() == 1
    assert "output_dir" in again.output
    assert "ready after" not in again.output
    subprocess.run(["mount", "-o", "remount,rw", str(mounted)], check=True)
    ended_exactly(words(), tmp_path, undisturbed()[0])


def test_an_output_folder_that_cannot_be_written_is_told_before_a_model_is_loaded(words, tmp_path):
    (tmp_path / "file").touch()
    run = started(words(output_dir=tmp_path / "file" / "output"), tmp_path)
    assert run.end() == 1
    assert f"output_dir: {tmp_path / 'file' / 'output'} cannot be made" in run.output
    assert "Traceback" not in run.output
    assert "caching latents" not in run.output


def test_a_cache_deleted_in_mid_run_is_made_again(words, tmp_path, undisturbed):
    run = started(words(), tmp_path)
    run.wait_for("tiny-step00000002-state")
    shutil.rmtree(tmp_path / "cache")
    assert run.end() == 0, run.output
    assert "the cached latents of" in run.output
    assert result(tmp_path) == undisturbed()[0]


def nan_in_data() -> None:
    """The VAE encodes one picture to NaN."""
    encode = AnimaNetworkTrainer.encode_pixels
    AnimaNetworkTrainer.encode_pixels = lambda self, pixels: (
        encode(self, pixels) * (float("nan") if pixels.shape[-1] > pixels.shape[-2] else 1.0)
    )


def nan_in_loss() -> None:
    """The loss of the third step is NaN."""
    losses = AnimaNetworkTrainer.losses

    def broken(self, inputs):
        return losses(self, inputs) * (float("nan") if self.state.step == 2 else 1.0)

    AnimaNetworkTrainer.losses = broken


def nan_in_gradients() -> None:
    """A gradient of the third step is infinite."""
    step = NetworkTrainer.step

    def broken(self, *arguments):
        parameter = next(self.network.parameters())
        if self.state.step == 2:
            parameter.register_hook(lambda gradient: gradient * float("inf"))
        return step(self, *arguments)

    NetworkTrainer.step = broken


@pytest.mark.parametrize("fault", [nan_in_data, nan_in_loss, nan_in_gradients])
def test_steps_that_are_not_finite_change_nothing_and_name_their_pictures(words, tmp_path, fault):
    run = started(words(max_train_steps=4), tmp_path, fault)
    assert run.end() == 0, run.output
    assert re.search(r"not finite.*\.png", run.output)
    check_all_is_whole(tmp_path / "output")


@pytest.mark.slow
def test_a_loading_process_that_dies_ends_the_run_with_a_message_and_a_state(words, tmp_path, undisturbed):
    run = started(words(**UNCACHED), tmp_path)
    run.wait_for("tiny-step00000002-state")
    loaders = psutil.Process(run.pid).children(recursive=True)
    assert loaders
    for loader in loaders:
        loader.kill()
    assert run.end() == 1
    assert "error: a process that loads pictures has died" in run.output
    assert "Traceback" not in run.output
    ended_exactly(words(**UNCACHED), tmp_path, undisturbed(**UNCACHED)[0])


def small_shared_memory(size: bytes) -> None:
    """Gives this process and its children a /dev/shm of their own, and little patience."""
    import ctypes

    dataset._MOST_WAITS = 1
    new_mounts, private = 0x20000, (1 << 18) | (1 << 14)
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(new_mounts),
        libc.mount(b"none", b"/", None, private, None),
        libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=" + size),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "no own /dev/shm")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (b"4k", "error: processes that load pictures cannot be started ([Errno 28] No space left on device)"),
        (b"64k", "error: a process that loads pictures has died or hangs, mostly as memory or /dev/shm is full"),
    ],
)
def test_full_shared_memory_ends_the_run_with_a_message(words, tmp_path, mounted, size, message):
    """`mounted` skips where mounts are not allowed."""
    run = started(words(**UNCACHED), tmp_path, partial(small_shared_memory, size))
    assert run.end() == 1
    assert message in run.output
    without = started(
        words(**{**UNCACHED, "max_data_loader_n_workers": 0}), tmp_path, partial(small_shared_memory, size)
    )
    assert without.end() == 0


def jumping_clock() -> None:
    """The clock jumps by up to ten days at every look."""
    now, jumps = time.time, random.Random(0)
    time.time = lambda: now() + jumps.uniform(-1e6, 1e6)


def test_a_clock_that_jumps_changes_nothing(words, tmp_path, undisturbed):
    run = started(words(), tmp_path, jumping_clock)
    run.wait_for("tiny-step00000003-state")
    run.send(signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    ended_exactly(words(), tmp_path, undisturbed()[0])
