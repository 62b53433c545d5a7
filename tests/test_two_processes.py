"""Runs of two processes: they train as one does, and end together."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

import train_network
from anima_train_network import AnimaNetworkTrainer
from library.errors import DataError
from library.planning import planner
from library.training.saving.checked_files import damage_of
from library.training.watching.monitor import Monitor
from tests.training_runs import TrainingRun, run_group, tensor_bytes
from tools import cache_dataset
from train_network import NetworkTrainer

SCRIPT = """
import json, sys
import torch
from library.training.processes import any_wishes, is_first_to_tell, make_accelerator, sum_over_processes

accelerator = make_accelerator()
rank = accelerator.process_index
gradients = [torch.full((2, 3), 1.0 + rank), torch.tensor(10.0 * rank)]
sum_over_processes(gradients)
flags = [any_wishes(flag) for flag in (rank == 1, False)]
told = [is_first_to_tell(text) for text in ("the same", f"of {rank}")]
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump([flags, [gradient.unique().tolist() for gradient in gradients], told], file)
accelerator.wait_for_everyone()
"""


def test_a_wish_to_stop_on_one_process_stops_all_gradients_are_summed_and_one_tells_what_both_know(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    root = Path(__file__).parents[1]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    seen = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    for flags, sums, _ in seen:
        assert (flags, sums) == ([True, False], [[3.0], [10.0]])
    same, own = zip(*(told for _, _, told in seen), strict=True)
    assert sorted(same) == [False, True]
    assert own == (True, True)


def tell_losses() -> None:
    """Has the trainer say the loss of every step."""
    step = NetworkTrainer.step

    def telling(self, *arguments):
        loss = step(self, *arguments)
        sys.stderr.write(f"\nloss {loss.item()!r}\n")
        return loss

    NetworkTrainer.step = telling


def losses_of(run: TrainingRun) -> list[float]:
    return [float(line.split()[1]) for line in run.output.splitlines() if line.startswith("loss ")]


@pytest.fixture
def three_pictures(tiny_anima, tmp_path):
    """5 uses of each of 3 pictures, which differ in size: in batches of 2 they make 9, of which 3 are of one sample."""
    folder = tmp_path / "train" / "5_subject"
    folder.mkdir(parents=True)
    for path in sorted((tiny_anima / "train" / "10_subject").glob("0*"))[:6]:
        shutil.copy(path, folder)
    return folder.parent


@pytest.mark.parametrize(
    ("settings", "accumulation"),
    [
        ({}, 1),
        ({"network_dropout": 0.3, "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}, 1),
        ({"network_module": "networks.lokr_anima", "network_args": ["module_dropout=0.5"]}, 2),
        ({"fill_last_batches": True}, 2),
    ],
    ids=["plain", "dropout, caches on disk", "LoKr with skipped modules, accumulated", "filled batches, accumulated"],
)
def test_two_processes_train_as_one_does(config, three_pictures, tmp_path, settings, accumulation):
    """The last window of each epoch has one batch, and so work for one process only."""
    common = {"train_data_dir": three_pictures, "train_batch_size": 2, "max_train_epochs": 2, "log_with": "none"}
    settings = {**common, "learning_rate": 1e-2, **settings}
    words = config(gradient_accumulation_steps=2 * accumulation, output_dir=tmp_path / "alone", **settings)
    one = TrainingRun(words, tmp_path / "alone.log", tell_losses)
    assert one.end() == 0, one.output
    words = config(gradient_accumulation_steps=accumulation, output_dir=tmp_path / "together", **settings)
    runs = run_group(words, tmp_path, 2, tell_losses)
    assert [run.end() for run in runs] == [0, 0], runs[0].output + runs[1].output
    first, second = map(losses_of, runs)
    assert len(first) == 2 * -(-9 // (2 * accumulation))
    assert first == second
    assert first == pytest.approx(losses_of(one), abs=1e-6)
    alone, together = (load_file(tmp_path / folder / "tiny.safetensors") for folder in ("alone", "together"))
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, rtol=1e-4, atol=1e-5)
    assert "saved" not in runs[1].output


def validation_curves(logs: Path) -> dict[int, dict[str, float]]:
    """What a run's progress file tells of its validation, by step."""
    (file,) = logs.glob("*/progress.jsonl")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    measured = [line for line in lines if "loss/validation/average" in line]
    return {line["step"]: {k: v for k, v in line.items() if k.startswith("loss/validation/")} for line in measured}


@pytest.mark.parametrize(
    ("split", "measured"), [(0.5, 3), (0.1, 1)], ids=["uneven shares", "nothing for the second process"]
)
def test_two_processes_measure_the_validation_loss_that_one_does(config, three_pictures, tmp_path, split, measured):
    """Before the first step the models are the same, and so is every number; afterwards they round otherwise."""
    for number, path in enumerate(sorted((three_pictures / "5_subject").iterdir())):
        shutil.copy(path, path.with_name(f"{9 - number}{path.suffix}"))  # six pictures, with captions
    settings = {
        "train_data_dir": three_pictures, "validation_split": split, "validate_every_n_steps": 2, "save_best": True,
        "max_train_steps": 4, "learning_rate": 1e-2, "train_batch_size": 2, "enable_bucket": False,
    }  # fmt: skip
    logs = {"one": tmp_path / "logs1", "two": tmp_path / "logs2"}
    words = config(**settings, gradient_accumulation_steps=2, logging_dir=logs["one"], output_dir=tmp_path / "alone")
    one = TrainingRun(words, tmp_path / "alone.log")
    assert one.end() == 0, one.output
    runs = run_group(config(**settings, logging_dir=logs["two"]), tmp_path, 2)
    assert [run.end() for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert f"validation_split keeps {measured} of 6 pictures" in runs[0].output
    curves = {name: validation_curves(folder) for name, folder in logs.items()}
    assert list(curves["one"]) == list(curves["two"]) == [0, 2, 4]
    assert curves["one"][0] == curves["two"][0]
    for step in (2, 4):
        assert curves["two"][step] == pytest.approx(curves["one"][step], abs=1e-6)
        assert curves["two"][step]["loss/validation/average"] != curves["two"][0]["loss/validation/average"]
    best = [(tmp_path / folder / "tiny-best.safetensors").is_file() for folder in ("alone", "output")]
    assert best[0] == best[1]
    assert "validation after" in runs[0].output and "validation after" not in runs[1].output


def files_below(folder: Path) -> list[str]:
    """The files by their paths, without the times in the names of sample pictures."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(re.sub(r"_\d{14}_", "_TIME_", path) for path in paths)


def test_two_processes_write_the_files_of_one_and_one_tells_of_them(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square --w 32 --h 32 --s 1\n", encoding="utf-8")
    settings = {
        "max_train_steps": 2, "train_batch_size": 1, "save_every_n_steps": 1, "save_state": True, "html_report": True,
        "ema_decay": 0.9, "sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 1,
    }  # fmt: skip
    folders = {"output_dir": tmp_path / "alone", "logging_dir": tmp_path / "logs1"}
    one = TrainingRun(config(**settings, **folders, gradient_accumulation_steps=2), tmp_path / "alone.log")
    assert one.end() == 0, one.output
    runs = run_group(config(**settings), tmp_path, 2)
    assert [run.end() for run in runs] == [0, 0], runs[0].output + runs[1].output
    files = files_below(tmp_path / "output")
    assert files == files_below(tmp_path / "alone")
    assert {"tiny.safetensors", "tiny-ema.safetensors", "tiny_report.html"} <= set(files)
    assert any(name.startswith("sample/tiny_000002_00_") for name in files)
    assert "tiny-step00000001-state/run_state.json" in files
    assert len(list((tmp_path / "logs").iterdir())) == 1
    for word in ("saved", "curves:", "sample", "report"):
        assert word in runs[0].output and word not in runs[1].output, word


def failing_step(rank: int) -> None:
    """That process cannot read a picture of the third step."""
    step = NetworkTrainer.step

    def failing(self, *arguments):
        if self.accelerator.process_index == rank and self.state.step == 2:
            raise DataError("picture lost.png cannot be read")
        return step(self, *arguments)

    NetworkTrainer.step = failing


def failing_validation(rank: int) -> None:
    """That process cannot read a picture that is measured after the second step."""
    losses_at = NetworkTrainer.losses_at

    def failing(self, *arguments):
        if self.accelerator.process_index == rank and self.state.step == 2:
            raise DataError("picture lost.png cannot be read")
        return losses_at(self, *arguments)

    NetworkTrainer.losses_at = failing


def failing_start(rank: int) -> None:
    """That process cannot encode its pictures."""
    encode = AnimaNetworkTrainer.encode_pixels

    def failing(self, pixels):
        if self.accelerator.process_index == rank:
            raise DataError("picture lost.png cannot be read")
        return encode(self, pixels)

    AnimaNetworkTrainer.encode_pixels = failing


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("fault", "saves"), [(failing_step, True), (failing_validation, True), (failing_start, False)])
def test_one_processs_failure_ends_all_with_its_message_and_a_save(config, tmp_path, fault, saves, rank):
    settings = {"validation_split": 0.5, "validate_every_n_steps": 2} if fault is failing_validation else {}
    runs = run_group(config(max_train_steps=6, log_with="none", **settings), tmp_path, 2, partial(fault, rank))
    assert [run.end() for run in runs] == [1, 1]
    assert "error: picture lost.png cannot be read" in runs[rank].output
    assert "error: another process of this run has ended; its own message tells why" in runs[1 - rank].output
    assert "Traceback" not in runs[0].output + runs[1].output
    state = tmp_path / "output" / "tiny-step00000002-state" / "run_state.json"
    assert state.is_file() == saves
    assert not saves or json.loads(state.read_text())["step"] == 2


def failing_and_saving_late(told: Path) -> None:
    """The second process fails, and what the main one then saves is written when that file is there."""
    failing_step(1)
    write = train_network.write_save

    def late(*arguments):
        sys.stderr.write("\nsaving\n")
        while not told.exists():
            time.sleep(0.01)
        return write(*arguments)

    train_network.write_save = late


def test_a_launcher_that_ends_the_others_does_not_keep_the_main_process_from_saving(config, tmp_path):
    """It sends them SIGTERM as soon as one has failed."""
    words = config(max_train_steps=6, log_with="none")
    runs = run_group(words, tmp_path, 2, partial(failing_and_saving_late, tmp_path / "told"))
    runs[0].wait_for("\nsaving\n")
    runs[0].send(signal.SIGTERM)
    (tmp_path / "told").touch()
    assert [run.end() for run in runs] == [1, 1], runs[0].output
    state = tmp_path / "output" / "tiny-step00000002-state"
    assert (state / "run_state.json").is_file() and damage_of(state) is None
    assert (tmp_path / "output" / "tiny-step00000002.safetensors").is_file()


def caching_instead(words: list[str]) -> None:
    """The processes fill caches for such a run, and the second cannot encode its pictures."""
    failing_start(1)
    sys.exit(cache_dataset.main(words))


def test_a_failure_of_one_process_that_fills_caches_is_told(config, tmp_path):
    words = config()
    runs = run_group(words, tmp_path, 2, partial(caching_instead, words))
    assert [run.end() for run in runs] == [1, 1]
    assert "error: picture lost.png cannot be read" in runs[1].output
    assert "error: another process of this run has ended; its own message tells why" in runs[0].output


def slow_steps() -> None:
    """Steps take so long that a signal comes before the last."""
    step = NetworkTrainer.step

    def slow(self, *arguments):
        time.sleep(0.5)
        return step(self, *arguments)

    NetworkTrainer.step = slow


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_either_process_stops_both_with_a_state_to_go_on_from(config, tmp_path, rank):
    settings = {"max_train_steps": 8, "save_every_n_steps": 1, "save_state": True, "log_with": "none"}
    words = config(**settings)
    runs = run_group(words, tmp_path, 2, slow_steps)
    runs[0].wait_for("tiny-step00000001-state")
    runs[rank].send(signal.SIGTERM)
    assert [run.end() for run in runs] == [130, 130], runs[0].output + runs[1].output
    assert "go on with --resume" in runs[0].output
    runs = run_group([*words, "--resume", "latest"], tmp_path, 2)
    assert [run.end() for run in runs] == [0, 0], runs[0].output + runs[1].output
    stopped = tensor_bytes(tmp_path / "output" / "tiny.safetensors")
    runs = run_group(words, tmp_path, 2)
    assert [run.end() for run in runs] == [0, 0], runs[0].output + runs[1].output
    assert stopped == tensor_bytes(tmp_path / "output" / "tiny.safetensors")


def clearing_late() -> None:
    """The main process takes its time to put back what a killed run had moved aside."""
    clear = train_network.clear_killed_saves

    def late(settings):
        time.sleep(1)
        clear(settings)

    train_network.clear_killed_saves = late


def without_the_state() -> None:
    """The second process does not see the main one's output_dir, as on another machine."""
    find = planner.find_state
    planner.find_state = lambda *arguments: find(*arguments) if PartialState().process_index == 0 else None


@pytest.mark.parametrize("sees_all", [True, False])
def test_all_go_on_from_the_same_state_or_end(config, tmp_path, sees_all):
    words = config(max_train_steps=2, save_every_n_steps=1, save_state=True, log_with="none")
    assert [run.end() for run in run_group(words, tmp_path, 2)] == [0, 0]
    output = tmp_path / "output"
    shutil.rmtree(output / "tiny-state")
    (output / "tiny-step00000001-state").rename(output / ".tiny-step00000001-state.99999999.old")
    runs = run_group([*words, "--resume", "latest"], tmp_path, 2, clearing_late if sees_all else without_the_state)
    ends, said = [run.end() for run in runs], runs[0].output + runs[1].output
    if sees_all:
        assert ends == [0, 0], said
        assert "tiny-step00000001-state at step 1 of 2" in runs[0].output
    else:
        assert ends == [1, 1], said
        assert said.count("error: the processes of this run differ in the state to resume: start them") == 1


def alert_on_the_second() -> None:
    """The second process finds its memory nearly full after the third step."""
    look = Monitor.look

    def finding(self, records, weights_norm):
        found = look(self, records, weights_norm)
        alerts = ("memory is nearly full",) if PartialState().process_index == 1 and records[-1].step == 3 else ()
        return replace(found, alerts=alerts)

    Monitor.look = finding


def test_an_alert_of_one_process_ends_all_with_a_state_where_it_shall(config, tmp_path):
    words = config(max_train_steps=5, log_every_n_steps=1, log_with="none", anima_monitor_alert_policy="raise")
    runs = run_group(words, tmp_path, 2, alert_on_the_second)
    assert [run.end() for run in runs] == [1, 1]
    assert sum(run.output.count("error: memory is nearly full") for run in runs) == 1
    state = tmp_path / "output" / "tiny-step00000003-state" / "run_state.json"
    assert json.loads(state.read_text())["step"] == 3


def test_what_all_processes_find_wrong_is_told_once(config, tmp_path):
    runs = run_group(config(train_data_dir=tmp_path / "nowhere"), tmp_path, 2)
    assert [run.end() for run in runs] == [1, 1]
    assert sum(run.output.count("error: ") for run in runs) == 1
