"""What a run shows of itself: `progress.jsonl`, the report, and lines on the console."""

import json
import os
import re
import signal
import socket
import time
from urllib.request import urlopen

import pytest
from PIL import Image

from anima_train_network import AnimaNetworkTrainer, main
from library.errors import UserError
from library.training.watching.loss_spikes import LossSpike, LossSpikes
from library.training.watching.sinks import TensorBoardCurves
from library.training.watching.trackers import Tracker


def progress(tmp_path):
    (file,) = (tmp_path / "logs").glob("*/progress.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_run_tells_its_course_and_writes_a_report(config, losses, tiny_anima, tmp_path, capsys):
    words = config(
        max_train_steps=4, train_batch_size=1, log_every_n_steps=2, save_every_n_steps=2, html_report=True,
        sample_every_n_steps=4, sample_prompts=tiny_anima / "sample_prompts.txt",
    )  # fmt: skip
    assert main(words) == 0

    lines = progress(tmp_path)
    points = [line for line in lines if "loss/current" in line]
    assert {line["step"]: line["loss/current"] for line in points} == pytest.approx(
        {step: losses[step - 1] for step in {line["step"] for line in points}}
    )
    assert {2, 4} <= {line["step"] for line in points}
    assert all(line["total_steps"] == 4 for line in lines)
    assert points[-1]["time/seconds_left"] == 0
    saves = [(line["step"], line["text"]) for line in lines if line["event"] == "save"]
    assert saves == [(2, "tiny-step00000002"), (4, "tiny")]
    assert [line["step"] for line in lines if line["event"] == "sample"] == [4]
    assert (lines[-1]["event"], lines[-1]["text"]) == ("end", "finished")

    page = (tmp_path / "output" / "tiny_report.html").read_text(encoding="utf-8")
    assert "finished after 4 of 4 steps" in page
    rows = re.findall(
        r'<td>10_subject/00\d\.png</td><td class="number">(\d)</td><td class="number">([\d.]+)</td>', page
    )
    assert sum(int(samples) for samples, _ in rows) == 4
    assert sum(int(samples) * float(loss) for samples, loss in rows) == pytest.approx(sum(losses), abs=1e-3)
    assert "Problems: none" in page
    assert str(tmp_path) not in page
    assert page.count("data:image/jpeg") == 2  # the base model's, and the adapter's
    console = capsys.readouterr().err
    assert re.search(r"^step 4 of 4: loss \d", console, re.MULTILINE)


def test_a_run_tells_one_speed_and_a_resumed_one_the_steps_that_are_left(config, tmp_path, capsys):
    common = {"max_train_steps": 5, "log_every_n_steps": 1}
    assert main(config(**common, save_every_n_steps=3, save_state=True)) == 0
    said = capsys.readouterr().err
    assert "; training 5 steps\n" in said
    last, closing = re.findall(r"([\d.e-]+) s a step", said)[-2:]
    assert last == closing and f"trained up to step 5, {closing} s a step\n" in said
    assert main(config(**common, resume=tmp_path / "output" / "tiny-step00000003-state")) == 0
    assert "; training 2 steps\n" in capsys.readouterr().err


def test_a_run_that_fails_tells_so(config, monkeypatch, tmp_path):
    step = AnimaNetworkTrainer.step

    def fail_at_the_third(self, *arguments):
        if self.state.step == 2:
            raise UserError("the disk fell off")
        return step(self, *arguments)

    monkeypatch.setattr(AnimaNetworkTrainer, "step", fail_at_the_third)
    assert main(config(max_train_steps=4, log_every_n_steps=1, html_report=True)) == 1
    end = progress(tmp_path)[-1]
    assert (end["event"], end["step"], end["text"]) == ("end", 2, "ended by UserError: the disk fell off")
    assert "ended by UserError: the disk fell off" in (tmp_path / "output" / "tiny_report.html").read_text()


def test_a_first_validation_that_fails_is_told_and_nothing_is_saved(config, monkeypatch, tmp_path):
    closed, close = [], Tracker.close

    def fail(self, *_):
        raise UserError("the disk fell off")

    monkeypatch.setattr(AnimaNetworkTrainer, "losses_at", fail)
    monkeypatch.setattr(Tracker, "close", lambda self: closed.append(close(self)))
    assert main(config(validation_split=0.5, html_report=True)) == 1
    end = progress(tmp_path)[-1]
    assert (end["event"], end["step"], end["text"]) == ("end", 0, "ended by UserError: the disk fell off")
    assert closed == [None]
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["tiny_report.html"]


def test_a_run_that_is_told_to_stop_at_its_first_samples_stops_after_a_step(config, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square --w 32 --h 32 --s 1\n", encoding="utf-8")
    render = AnimaNetworkTrainer.render_samples

    def stopped(self):
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(AnimaNetworkTrainer, "render_samples", render)
        return render(self)

    monkeypatch.setattr(AnimaNetworkTrainer, "render_samples", stopped)
    assert main(config(max_train_steps=3, sample_prompts=tmp_path / "prompts.txt", sample_at_first=True)) == 130
    end = progress(tmp_path)[-1]
    assert (end["event"], end["step"], end["text"]) == ("end", 1, "stopped")
    assert (tmp_path / "output" / "tiny-step00000001-state" / "run_state.json").is_file()


def test_a_report_that_cannot_be_written_ends_no_run(config, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.training.watching.report.write_report", fail)
    assert main(config(html_report=True, log_with="none")) == 0
    assert "warning: the report is left out: OSError: " in capsys.readouterr().err
    assert (tmp_path / "output" / "tiny.safetensors").is_file()
    assert not (tmp_path / "logs").exists()


def test_curves_that_cannot_be_written_end_no_run(config, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardCurves, "log", fail)
    assert main(config(max_train_steps=3, log_every_n_steps=1)) == 0
    said = capsys.readouterr().err
    assert said.count("warning: TensorBoardCurves stopped, and is left out of the rest of the run: OSError: ") == 1
    lines = progress(tmp_path)
    assert {1, 2, 3} <= {line["step"] for line in lines if "loss/current" in line}
    assert (lines[-1]["event"], lines[-1]["step"], lines[-1]["text"]) == ("end", 3, "finished")
    assert (tmp_path / "output" / "tiny.safetensors").is_file()


def test_tensorboard_shows_the_runs_of_a_folder_until_the_run_ends(config, tmp_path, monkeypatch, capsys):
    seen, step = [], AnimaNetworkTrainer.step

    def looking(self, *arguments):
        deadline, said = time.monotonic() + 60, ""
        while not (found := re.search(r"TensorBoard: (http\S+)\n", said)):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
            said += capsys.readouterr().err
        address = found[1]
        with urlopen(address, timeout=60) as page, urlopen(f"{address}data/logdir", timeout=60) as folder:
            seen.append((address, page.status, b"TensorBoard" in page.read(), json.load(folder)))
        return step(self, *arguments)

    monkeypatch.setattr(AnimaNetworkTrainer, "step", looking)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(config(auto_start_tensorboard=True, tensorboard_port=port, max_train_steps=1)) == 0
    ((address, *answers),) = seen
    assert answers == [200, True, {"logdir": str((tmp_path / "logs").resolve())}]
    with pytest.raises(OSError, match="refused"):
        urlopen(address, timeout=60)
    assert "TensorBoard ended" not in capsys.readouterr().err


def test_nothing_is_shown_or_drawn_before_the_settings_are_checked(config, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        "library.training.watching.trackers.TensorBoardServer", lambda *arguments: started.append(arguments)
    )
    assert main(config(auto_start_tensorboard=True, train_data_dir=tmp_path / "nowhere")) == 1
    assert started == [] and not (tmp_path / "logs").exists()


class FailingHub:
    """A service that fails at every request, or at every upload alone."""

    fails_to_make = True

    def __init__(self, **_):
        pass

    def create_repo(self, **_):
        if self.fails_to_make:
            raise ConnectionError("no route")

    def upload_file(self, **_):
        raise ConnectionError("no route")

    upload_folder = upload_file


@pytest.mark.parametrize("fails_to_make", [True, False])
def test_a_hub_that_fails_ends_no_run(config, tmp_path, monkeypatch, capsys, fails_to_make):
    monkeypatch.setattr(FailingHub, "fails_to_make", fails_to_make)
    monkeypatch.setattr("huggingface_hub.HfApi", FailingHub)
    monkeypatch.setattr("library.training.saving.upload._FIRST_PAUSE", 0.0)
    hub = {"huggingface_repo_id": "me/a", "save_state_to_huggingface": True}
    assert main(config(**hub, save_every_n_steps=1, save_state=True)) == 0
    said = capsys.readouterr().err
    for name in ("tiny-step00000001.safetensors", "tiny-step00000001-state", "tiny.safetensors"):
        for attempt in range(1, 6):
            problem = f"uploading {name} to me/a failed ({attempt} of 5 tries): ConnectionError: no route"
            assert said.count(f"warning: {problem}") == 1
        assert f"warning: {name} was not uploaded; it lies in {tmp_path / 'output'}" in said
        assert (tmp_path / "output" / name).exists()


@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_a_loss_spike_ends_a_run_with_a_state_where_it_shall(config, tmp_path, monkeypatch, capsys, policy):
    def spike(self, record):
        return LossSpike(3, record.loss, record.loss / 9, record.samples) if record.step == 3 else None

    monkeypatch.setattr(LossSpikes, "spike", spike)
    code = main(config(max_train_steps=5, log_every_n_steps=1, anima_monitor_alert_policy=policy))
    said, end, output = capsys.readouterr().err, progress(tmp_path)[-1], tmp_path / "output"
    state = output / "tiny-step00000003-state" / "run_state.json"
    if policy == "warn":
        assert (code, end["step"], end["text"]) == (0, 5, "finished")
        assert "warning: step 3: " in said
        assert not state.exists()
        return
    assert (code, end["step"]) == (1, 3)
    assert end["text"].startswith("ended by AlertError: step 3: ")
    assert "error: step 3: " in said and "(anima_monitor_alert_policy = raise)" in said
    assert json.loads(state.read_text(encoding="utf-8"))["step"] == 3
    assert (output / "tiny-step00000003.safetensors").is_file()


def test_prompts_in_toml_are_rendered(config, tmp_path):
    prompts = tmp_path / "prompts.toml"
    prompts.write_text(
        "[prompt]\nwidth = 64\nheight = 32\nsample_steps = 1\n"
        '[[prompt.subset]]\nprompt = "a red square"\nseed = 5\n'
        '[[prompt.subset]]\nprompt = "a blue circle"\nwidth = 32\n',
        encoding="utf-8",
    )
    assert main(config(sample_prompts=prompts, sample_every_n_steps=2, log_with="none")) == 0
    found = []
    for path in sorted((tmp_path / "output" / "sample").glob("tiny_000002_[0-9][0-9]_*.png")):
        with Image.open(path) as picture:
            found.append((picture.size, picture.text["parameters"].splitlines()[0], path.stem.rsplit("_", 1)[1]))
    assert found == [((64, 32), "a red square", "5"), ((32, 32), "a blue circle", "42")]
