import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from library.training.step_records import SampleLoss, StepRecord
from library.training.watching.history import RunHistory
from library.training.watching.report import AdapterHealth, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture
def history():
    history = RunHistory(total_steps=40)
    for step in range(1, 41):
        history.log({"loss/current": 1 / step, "loss/average": 0.5, "lr/unet": 1e-4, "norm/gradient": math.nan}, step)
        samples = tuple(
            SampleLoss(Path(f"train/{name}"), step / 41, loss / step) for name, loss in [("<a>.png", 1), ("b.png", 3)]
        )
        history.look([StepRecord(step, 1.0, 1.0, samples)])
    measured = {"average": 0.25, "timestep_1": 0.2, "timestep_2": 0.3}
    history.log({f"loss/validation/{name}": loss for name, loss in measured.items()}, 40)
    history.log_image("sample_base/00", Image.new("RGB", (64, 32), "yellow"), 20, "a <red> square\nSteps: 4")
    history.log_image("sample/00", Image.new("RGB", (64, 32), "red"), 20, "a <red> square\nSteps: 4")
    history.log_image("sample/sheet", Image.new("RGB", (64, 32), "white"), 20)
    history.log_image("sample/00", Image.new("RGB", (64, 32), "blue"), 40)
    history.log_image("sample/01", Image.new("RGB", (64, 32), "green"), 40)
    history.event("alert", 7, "the loss is 9, where 1 is usual & expected")
    return history


@pytest.fixture
def page(history, tmp_path):
    health = AdapterHealth("40 lora (rank 4)", ("a.b: NaN or infinity",), {"transformer 0": 2.0, "transformer 1": 1.0})
    settings = {"network_dim": 4, "prompt": "<b>", "vae": None, "cache_latents": True}
    path = tmp_path / "tiny_report.html"
    write_report(path, "tiny", "finished", history, settings, {"network_dim", "prompt"}, health)
    return path


def section(page, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', page.read_text(encoding="utf-8"), re.DOTALL)[1]


def test_everything_that_was_recorded_is_on_the_page(page):
    summary = "finished after 40 of 40 steps and 0 s; average loss 0.5000; least validation loss 0.2500, after step 40"
    assert summary in page.read_text(encoding="utf-8")
    assert "<li>step 7: the loss is 9, where 1 is usual &amp; expected</li>" in section(page, "alerts")
    curves = section(page, "curves")
    assert curves.count("<svg") == 5
    for text in (
        ">current<",
        ">Validation<",
        ">timestep_2<",
        "Learning rate",
        "Loss by timestep",
        "75 to 100 % of the",
    ):
        assert text in curves
    assert "Gradient" not in curves  # it was never finite
    rows = re.findall(r"<tr><td>(.*?)</td>.*?>([\d.]+)</td></tr>", section(page, "pictures"))
    assert rows == [("train/b.png", "1.500"), ("train/&lt;a&gt;.png", "0.500")]
    assert "40 lora (rank 4). Problems: 1." in section(page, "adapter")
    assert "a.b: NaN or infinity" in section(page, "adapter")
    settings = section(page, "settings")
    assert "<td>prompt</td><td>&lt;b&gt;</td>" in settings
    chosen, _, others = settings.partition("<details>")
    assert "<td>network_dim</td><td>4</td>" in chosen
    assert "<td>cache_latents</td><td>true</td>" in others
    assert "vae" not in settings


def test_samples_stand_in_a_row_for_each_prompt_and_a_column_for_each_sampling(page):
    samples = section(page, "samples")
    heads = ["", "base model", "step 20", "step 40", "a &lt;red&gt; square", "sample/01"]
    assert re.findall(r"<th[^>]*>(.*?)</th>", samples) == heads
    assert len(re.findall(r'<img alt="" src="data:image/jpeg;base64,[A-Za-z0-9+/=]+">', samples)) == 4
    assert ">sample/01</th><td></td><td></td><td><img" in samples


def test_nothing_is_fetched_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    links = set(re.findall(r"""(?:src|href)=["']([^"'#][^"']{0,20})""", text))
    assert {link[:5] for link in links} <= {"data:"}


def test_a_run_without_a_step_has_a_page_too(tmp_path):
    path = tmp_path / "tiny_report.html"
    write_report(path, "tiny", "ended by OSError: <disk>", RunHistory(total_steps=40), {}, (), None)
    assert "ended by OSError: &lt;disk&gt;" in path.read_text(encoding="utf-8")
    assert "<h2>Adapter" not in path.read_text(encoding="utf-8")


def test_long_runs_make_no_long_pages(tmp_path):
    history = RunHistory(total_steps=100_000)
    for step in range(1, 100_001, 10):
        history.log({"loss/current": step % 7, "loss/average": 3.0}, step)
    for step in range(0, 100_000, 500):
        history.log_image("sample/00", Image.effect_noise((64, 64), 50), step)
    write_report(tmp_path / "page.html", "tiny", "finished", history, {}, (), None)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(page) < 400_000
    assert len(re.findall("<img", page)) == 12
    assert "step 0<" in page
    assert "step 99500<" in page


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_it(page, tmp_path):
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1800"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, *options, profile, f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=2**24)}
        assert picture.size == (1000, 1800)
    # matplotlib's first two lines, and the sample pictures of two prompts as JPEG gives them.
    for wanted in ((31, 119, 180), (255, 127, 14), (0, 0, 254), (0, 128, 1)):
        assert any(max(abs(a - b) for a, b in zip(colour, wanted, strict=True)) <= 3 for colour in colours), wanted
