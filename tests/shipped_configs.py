"""The configs that are shipped, and copies of them that train on a CPU: `cpu_overlay.toml` says what is swapped."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from library.settings.toml_files import read_toml

ROOT = Path(__file__).parents[1]
OVERLAY = read_toml(Path(__file__).with_name("cpu_overlay.toml")).tables
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.toml") if not path.name.endswith("_dataset.toml"))
NAMES = [path.relative_to(ROOT / "configs").as_posix() for path in CONFIGS]
SWAPPED_KEYS = {
    *OVERLAY["model_files"],
    *OVERLAY["folders"]["pictures"],
    *OVERLAY["folders"]["written"],
    *OVERLAY["sizes"]["keys"],
}
_LINE = re.compile(r"""^(\s*)(\w+)(\s*=\s*)("[^"]*"|\[[^\]]*\]|[^\s#]+)""", re.MULTILINE)


def words_for(name: str) -> list[str]:
    """The command-line words that train a shipped config as its head says."""
    path = ROOT / "configs" / name
    dataset = path.with_name(path.name.replace("_train_args.toml", "_dataset.toml"))
    more = ["--dataset_config", str(dataset)] if dataset != path else []
    return ["--config_file", str(path), *more]


def small_words_for(name: str, model: Path, folder: Path) -> list[str]:
    """Words for a copy in `folder` with the overlay: the tiny model in `model`, small pictures, two steps."""
    words = words_for(name)
    for index in range(1, len(words), 2):
        copy = folder / Path(words[index]).name
        copy.write_text(with_overlay(Path(words[index]).read_text(encoding="utf-8"), model, folder), encoding="utf-8")
        words[index] = str(copy)
    return words + [word for key, value in OVERLAY["command_line"].items() for word in (f"--{key}", str(value))]


def with_overlay(text: str, model: Path, folder: Path) -> str:
    """The text of a config with its values swapped; the folders of pictures it names are made."""

    def swap(match: re.Match[str]) -> str:
        indent, key, equals, old = match.groups()
        return f"{indent}{key}{equals}{_swapped(key, old, model, folder)}"

    return _LINE.sub(swap, text)


def _swapped(key: str, old: str, model: Path, folder: Path) -> Any:
    if key in OVERLAY["model_files"]:
        return f'"{(model / OVERLAY["model_files"][key]).as_posix()}"'
    if key in OVERLAY["sizes"]["keys"]:
        return re.sub(r"\d+", lambda side: str(max(16, int(side[0]) // OVERLAY["sizes"]["divisor"] // 16 * 16)), old)
    if key in OVERLAY["folders"]["written"]:
        return f'"{(folder / old.strip(chr(34))).as_posix()}"'
    if key in OVERLAY["folders"]["pictures"]:
        pictures = folder / old.strip('"')
        if not pictures.exists():
            shutil.copytree(model / "train" / "10_subject", pictures)
        return f'"{pictures.as_posix()}"'
    return old
