"""Sets everything up and runs the trainer on a tiny model, or runs the tests. Needs only Python 3.10 or newer.

    python tools/quickstart.py demo [settings for the trainer]
    python tools/quickstart.py test [arguments for pytest]

An environment that already meets requirements.txt is used as it is; otherwise .venv is made here and filled by pip,
with pip's own environment variables (PIP_INDEX_URL, PIP_CONSTRAINT, ...) in force.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import operator
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
MODEL = ROOT / "demo" / "model"
CONFIG = "configs/examples/quickstart.toml"
# accelerate asks for these when they are left out; --quiet spares its traceback after an error of the trainer.
ANSWERS = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH = ["launch", "--quiet", *ANSWERS]

COMPARISONS = {">=": operator.ge, "<": operator.lt}
BOUND = r'(>=|<)\s*"?([\d.]+)"?'
SYSTEM = r'platform_system\s*==\s*"(\w+)"'
REQUIREMENT = re.compile(rf"([\w.-]+)((?:{BOUND},?)*)(?:\s*;\s*(?:python_version\s*({BOUND})|{SYSTEM}))?")


def main(arguments: Sequence[str]) -> int:
    """Sets up and runs the command; returns the exit code."""
    if sys.version_info < (3, 10):  # noqa: UP036 - this script meets any Python
        say(f"error: Python 3.10 or newer is needed; this is {platform.python_version()} ({sys.executable})")
        return 1
    parser = argparse.ArgumentParser(description="Set up, then train on a tiny model (demo) or run the tests (test).")
    parser.add_argument("command", choices=("demo", "test"))
    parser.add_argument("extra", nargs=argparse.REMAINDER, help="passed on to the trainer or to pytest")
    parsed = parser.parse_args(arguments)

    files = ["requirements.txt"] + (["tests/requirements.txt"] if parsed.command == "test" else [])
    unmet = [line for file in files for line in requirements(ROOT / file) if not is_met(line)]
    if unmet and Path(sys.prefix).resolve() != VENV.resolve():
        return make_venv() or run([str(venv_python()), str(Path(__file__).resolve()), *arguments])
    if unmet and install(files, unmet) != 0:
        say("error: pip could not install the packages above; the text before this line says why")
        return 1
    return demo(parsed.extra) if parsed.command == "demo" else test(parsed.extra)


def test(extra: Sequence[str]) -> int:
    """Runs the tests, one process for each processor."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run([sys.executable, "-m", "pytest", "-n", "auto", *extra])


def requirements(file: Path) -> list[str]:
    """The lines of a requirements file, without comments."""
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def is_met(requirement: str) -> bool:
    """Whether a line such as 'name>=a,<b' holds for the running interpreter and its packages.

    Behind it may stand '; python_version < "c"' or '; platform_system == "Linux"'.
    """
    match = REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise ValueError(f"a requirement of a form this script does not know: {requirement}")
    name, bounds, version, system = match[1], match[2], match[5], match[8]
    if (version and not within(platform.python_version(), version)) or (system and platform.system() != system):
        return True
    try:
        return within(importlib.metadata.version(name), bounds)
    except importlib.metadata.PackageNotFoundError:
        return False


def within(version: str, bounds: str) -> bool:
    """Whether a version lies within bounds such as '>=2.0,<3'."""
    return all(COMPARISONS[sign](release(version), release(bound)) for sign, bound in re.findall(BOUND, bounds))


def release(version: str) -> tuple[int, ...]:
    """The release numbers without zeros at the end: '2.10.0+cpu' -> (2, 10)."""
    numbers = [int(number) for number in re.findall(r"\d+", re.match(r"[\d.]*", version)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def venv_python() -> Path:
    """The interpreter of .venv."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv() -> int:
    """Makes .venv unless a working one is there; returns the exit code."""
    has_pip = [str(venv_python()), "-m", "pip", "--version"]
    if venv_python().exists() and subprocess.run(has_pip, capture_output=True).returncode == 0:
        return 0
    say(f"Making the environment {VENV}")
    code = run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    if code != 0:
        say("error: no environment could be made; on Debian and Ubuntu, install python3-venv first")
    return code


def install(files: Sequence[str], unmet: Sequence[str]) -> int:
    """Installs the requirement files with pip; returns the exit code."""
    say(f"Installing into {sys.prefix}: {', '.join(unmet)}")
    return run([sys.executable, "-m", "pip", "install", *(part for file in files for part in ("-r", file))])


def demo(settings: Sequence[str]) -> int:
    """Makes the tiny model if it is not there, trains on it and says where the results lie; returns the exit code."""
    if not (MODEL / "sample_prompts.txt").exists():  # written last
        say(f"Writing a tiny model and a few pictures to {MODEL}")
        code = run([sys.executable, str(ROOT / "tools" / "make_tiny_anima.py"), "--output_dir", str(MODEL)])
        if code != 0:
            return code
    program = ["anima_train_network.py", "--config_file", CONFIG, *settings]
    say(f"Training: {shlex.join(['accelerate', 'launch', *program])}")
    code = run([sys.executable, "-m", "accelerate.commands.accelerate_cli", *LAUNCH, *program])
    if code != 0:
        say(f"error: the training ended with exit code {code}")
        return code
    return show_results(settings)


def show_results(settings: Sequence[str]) -> int:
    """Says where the adapter, its log and the newest sample picture lie; 1 if one is missing."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--output_dir", default="demo/output")
    parser.add_argument("--output_name", default="quickstart")
    parser.add_argument("--logging_dir", default="demo/logs")
    place, _ = parser.parse_known_args(settings)
    output = ROOT / place.output_dir
    results = {
        "adapter": list(output.glob(f"{place.output_name}.safetensors")),
        "log": list((ROOT / place.logging_dir).glob(f"{place.output_name}_*")),
        "sample picture": list((output / "sample").glob(f"{place.output_name}_*.png")),
    }
    for what, paths in results.items():
        say(f"{what}: {max(paths, key=lambda path: path.stat().st_mtime) if paths else 'missing'}")
    if not all(results.values()):
        say("error: the training ended well but did not write everything above")
        return 1
    say("The tiny model's weights are random, its VAE's too: the picture proves that rendering works, and shows noise.")
    return 0


def run(command: Sequence[str]) -> int:
    """Runs a program in the repository's folder; Ctrl+C is left to the program, which may have work to save."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.Popen(command, cwd=ROOT).wait()
    finally:
        signal.signal(signal.SIGINT, before)


def say(text: str) -> None:
    """Prints at once, so that the line stands before what a program started next prints."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
