"""What a run shows of itself: `progress.jsonl`, the report, and lines on the console."""

import json
import re

import pytest

from anima_train_network import AnimaNetworkTrainer, main
from library.errors import UserError


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


def test_a_report_that_cannot_be_written_ends_no_run(config, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.training.report.write_report", fail)
    assert main(config(html_report=True, log_with="none")) == 0
    assert "warning: the report is left out: OSError: " in capsys.readouterr().err
    assert (tmp_path / "output" / "tiny.safetensors").is_file()
    assert not (tmp_path / "logs").exists()
