"""The quick start: what it installs where, what it starts, and the real demo from start to end."""

from __future__ import annotations

import importlib.metadata
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools import quickstart

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("requirement", "installed", "met"),
    [
        ("torch>=2.6", "2.13.0+cpu", True),
        ("torch>=2.6", "2.5.1", False),
        ("torch>=2.6", "2.6", True),
        ("torch>=2.10", "2.9", False),
        ("transformers>=5.0,<6", "5.0.0", True),
        ("transformers>=5.0,<6", "6.0.0", False),
        ("transformers>=5.0,<6", "4.57.1", False),
        ("lycoris-lora>=4.1,<5", "4.1.0.post1", True),
        ("diffusers>=0.42,<0.43", "0.43.0.dev0", False),
        ("pip", "1", True),
        ("pip", None, False),
        ('tomli>=2.0,<3; python_version < "3.11"', None, sys.version_info >= (3, 11)),
        ('tomli>=2.0,<3; python_version >= "3.10"', None, False),
        ('tomli>=2.0,<3; python_version >= "3.10"', "2.2", True),
    ],
)
def test_is_met(monkeypatch, requirement, installed, met):
    def version(name: str) -> str:
        assert name in ("torch", "transformers", "lycoris-lora", "diffusers", "pip", "tomli")
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert quickstart.is_met(requirement) is met


def test_unknown_form_of_requirement_is_an_error():
    with pytest.raises(ValueError, match=r"torch~=2\.6"):
        quickstart.is_met("torch~=2.6")


def test_requirement_files_are_read_and_met_here():
    """The tests run in an environment that `quickstart.py test` made or accepted."""
    lines = [line for file in ("", "tests/") for line in quickstart.requirements(ROOT / f"{file}requirements.txt")]
    assert any(line.startswith("torch>=") for line in lines)
    assert any(line.startswith("pytest>=") for line in lines)
    assert [line for line in lines if not quickstart.is_met(line)] == []


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The programs the quick start would start; each ends well."""
    commands = []
    monkeypatch.setattr(quickstart, "run", lambda command: commands.append(list(command)) or 0)
    return commands


def test_good_environment_is_used_as_it_is(started):
    assert quickstart.main(["test", "-k", "some thing"]) == 0
    assert started == [[sys.executable, "-m", "pytest", "-n", "auto", "-k", "some thing"]]


def test_other_environment_is_left_alone_and_venv_made(started, monkeypatch, tmp_path):
    venv = tmp_path / "a folder" / ".venv"
    monkeypatch.setattr(quickstart, "VENV", venv)
    monkeypatch.setattr(quickstart, "is_met", lambda line: not line.startswith("torch"))
    assert quickstart.main(["demo", "--seed", "1"]) == 0
    in_venv = str(quickstart.venv_python())
    assert in_venv.startswith(str(venv))
    assert started == [
        [sys.executable, "-m", "venv", "--clear", str(venv)],
        [in_venv, str(ROOT / "tools" / "quickstart.py"), "demo", "--seed", "1"],
    ]


def test_venv_is_filled_when_it_lacks_something(started, monkeypatch):
    monkeypatch.setattr(quickstart, "VENV", Path(sys.prefix))
    monkeypatch.setattr(quickstart, "is_met", lambda line: not line.startswith("pytest"))
    assert quickstart.main(["test"]) == 0
    install = [sys.executable, "-m", "pip", "install", "-r", "requirements.txt", "-r", "tests/requirements.txt"]
    assert started == [install, [sys.executable, "-m", "pytest", "-n", "auto"]]


def test_real_venv_is_made_once_and_again_when_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "VENV", tmp_path / "with space" / ".venv")
    assert quickstart.make_venv() == 0
    assert subprocess.run([quickstart.venv_python(), "-m", "pip", "--version"]).returncode == 0
    commands = []
    monkeypatch.setattr(quickstart, "run", lambda command: commands.append(command) or 0)
    assert quickstart.make_venv() == 0
    assert commands == []
    for pip in (tmp_path / "with space" / ".venv").rglob("site-packages/pip"):
        shutil.rmtree(pip)
    assert quickstart.make_venv() == 0
    assert len(commands) == 1


def test_old_python_gets_one_clear_message(started, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert quickstart.main(["demo"]) == 1
    assert capsys.readouterr().out.startswith("error: Python 3.10 or newer is needed")
    assert started == []


def test_failed_install_stops(monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "VENV", Path(sys.prefix))
    monkeypatch.setattr(quickstart, "is_met", lambda line: False)
    monkeypatch.setattr(quickstart, "run", lambda command: 2)
    assert quickstart.main(["test"]) == 1
    assert "pip could not install" in capsys.readouterr().out


def test_demo_makes_the_model_once_and_reports_missing_results(started, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quickstart, "MODEL", tmp_path / "model")
    outputs = ["--output_dir", str(tmp_path), "--logging_dir", str(tmp_path / "logs")]
    assert quickstart.demo(outputs) == 1
    assert [Path(command[1]).name for command in started] == ["make_tiny_anima.py", "-m"]
    assert started[1][-7:] == ["anima_train_network.py", "--config_file", quickstart.CONFIG, *outputs]
    assert "sample picture: missing" in capsys.readouterr().out

    (tmp_path / "model").mkdir()
    for name in ("model/sample_prompts.txt", "quickstart.safetensors", "sample/quickstart_e1.png", "logs/quickstart_1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert quickstart.demo(outputs) == 0
    assert [command[1] for command in started[2:]] == ["-m"]
    assert f"adapter: {tmp_path / 'quickstart.safetensors'}" in capsys.readouterr().out


def test_failed_training_is_passed_on(monkeypatch, tmp_path):
    (tmp_path / "sample_prompts.txt").touch()
    monkeypatch.setattr(quickstart, "MODEL", tmp_path)
    monkeypatch.setattr(quickstart, "run", lambda command: 7)
    assert quickstart.demo([]) == 7


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal to send to one process")
def test_ctrl_c_is_left_to_the_program():
    """A program that handles SIGINT itself finishes, and its exit code arrives."""
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(5))\n"
        "os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5); os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    assert quickstart.run([sys.executable, "-c", program]) == 5


@pytest.fixture(scope="module")
def demo_copy(tmp_path_factory) -> Path:
    """A copy of the repository, under a path with spaces, in which the real demo has run."""
    copy = tmp_path_factory.mktemp("quick start") / "a clone"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "demo", "output", "logs", "tests", "docs")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    run_demo(copy)
    return copy


def run_demo(copy: Path, *settings: str) -> str:
    """Runs the demo from another folder; its output."""
    command = [sys.executable, str(copy / "tools" / "quickstart.py"), "demo", *settings]
    done = subprocess.run(command, cwd=copy.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_demo_writes_adapter_log_and_picture(demo_copy):
    output = demo_copy / "demo" / "output"
    assert sorted(path.name for path in output.glob("*.safetensors")) == [
        "quickstart-000001.safetensors",
        "quickstart.safetensors",
    ]
    adapter = load_file(output / "quickstart.safetensors")
    up = {name: tensor for name, tensor in adapter.items() if name.endswith(".lora_up.weight")}
    # 2 blocks of 10 Linears, 2 adapter blocks of 10.
    assert len(up) == 40
    assert all(math.isfinite(tensor.norm()) and tensor.norm() > 0 for tensor in up.values())
    assert not (demo_copy / ".venv").exists()
    (log,) = (demo_copy / "demo" / "logs").glob("quickstart_*")
    # The loss starts near 3.4 and ends near 1.9.
    losses = [event.value for event in EventAccumulator(str(log)).Reload().Scalars("loss/current")]
    assert len(losses) == 24
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])
    pictures = list((output / "sample").glob("quickstart_e*_00_*.png"))
    assert len(pictures) == 2
    assert {Image.open(picture).size for picture in pictures} == {(128, 128)}


def test_demo_can_be_repeated_and_takes_settings(demo_copy):
    model = demo_copy / "demo" / "model" / "anima.safetensors"
    written = model.stat().st_mtime_ns
    settings = ["--max_train_epochs", "1", "--output_name", "again", "--network_dim", "2"]
    said = run_demo(demo_copy, *settings)
    assert f"adapter: {demo_copy / 'demo' / 'output' / 'again.safetensors'}" in said
    assert model.stat().st_mtime_ns == written
    adapter = load_file(demo_copy / "demo" / "output" / "again.safetensors")
    assert {tensor.shape[0] for name, tensor in adapter.items() if name.endswith(".lora_down.weight")} == {2}


def test_defaults_of_the_script_are_those_of_the_example(monkeypatch, tmp_path, capsys):
    config = tomllib.loads((ROOT / quickstart.CONFIG).read_text(encoding="utf-8"))
    assert (ROOT / config["pretrained_model_name_or_path"]).parent == quickstart.MODEL
    assert ROOT / config["sample_prompts"] == quickstart.MODEL / "sample_prompts.txt"
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    adapter = tmp_path / config["output_dir"] / f"{config['output_name']}.safetensors"
    log = tmp_path / config["logging_dir"] / f"{config['output_name']}_20250101"
    picture = adapter.parent / "sample" / f"{config['output_name']}_e000001.png"
    for path in (adapter, log, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert quickstart.show_results([]) == 0
    assert capsys.readouterr().out.startswith(f"adapter: {adapter}\nlog: {log}\nsample picture: {picture}\n")
