"""The configs that are shipped, and copies of them that train on a CPU: `cpu_overlay.toml` says what is swapped."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from library.settings.toml_files import read_toml

ROOT = Path(__file__).parents[1]
OVERLAY = read_toml(Path(__file__).with_name("cpu_overlay.toml")).tables
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.toml") if not path.name.endswith("_dataset.toml"))
NAMES = [path.relative_to(ROOT / "configs").as_posix() for path in CONFIGS]
_LINE = re.compile(r"""^(\s*)(\w+)(\s*=\s*)("[^"]*"|\[[^\]]*\]|[^\s#]+)""", re.MULTILINE)


def words_for(name: str) -> list[str]:
    """The command-line words that train a shipped config as its head says."""
    path = ROOT / "configs" / name
    dataset = path.with_name(path.name.replace("_train_args.toml", "_dataset.toml"))
    more = ["--dataset_config", str(dataset)] if dataset != path else []
    return ["--config_file", str(path), *more]


def small_words_for(words: list[str], model: Path, folder: Path) -> list[str]:
    """Words for copies in `folder` with the overlay: a tiny model in `model`, small pictures, two steps."""
    small = []
    for flag, file in zip(words[::2], map(Path, words[1::2]), strict=True):
        copy = folder / file.name
        copy.write_text(with_overlay(file.read_text(encoding="utf-8"), model, folder), encoding="utf-8")
        small += [flag, str(copy)]
    small += [word for key, value in OVERLAY["command_line"].items() for word in (f"--{key}", str(value))]
    return [*small, *(f"--no-{name}" for name in OVERLAY["switches"]["off"])]


def with_overlay(text: str, model: Path, folder: Path) -> str:
    """The text of a config with its values swapped; the folders of pictures it names are made."""

    def swap(match: re.Match[str]) -> str:
        indent, key, equals, old = match.groups()
        return f"{indent}{key}{equals}{_swapped(key, old, model, folder)}"

    return _LINE.sub(swap, text)


def _swapped(key: str, old: str, model: Path, folder: Path) -> str:
    path = Path(old.strip('"'))
    if old == '""':
        return old
    if key in OVERLAY["model_files"]:
        return f'"{(model / OVERLAY["model_files"][key]).as_posix()}"'
    if key in OVERLAY["blocks"]:
        return str(OVERLAY["blocks"][key])
    if key in OVERLAY["sizes"]["keys"]:
        return re.sub(r"\d+", lambda side: str(max(16, int(side[0]) // OVERLAY["sizes"]["divisor"] // 16 * 16)), old)
    if key in OVERLAY["folders"]["written"]:
        return f'"{(folder / path.name).as_posix()}"'
    if key in OVERLAY["folders"]["pictures"]:
        if not (folder / path.name).exists():
            shutil.copytree(model / "train" / "10_subject", folder / path.name)
        return f'"{(folder / path.name).as_posix()}"'
    return old
