"""Sample prompts in Kohya's forms: lines of text with flags, or tables in TOML or JSON."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.anima_runtime.sampling.settings import SAMPLERS
from library.errors import SettingError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptRequest:
    """One picture to render. The defaults are those of a line without flags; cfg 1 leaves the negative prompt out."""

    prompt: str
    negative: str = ""
    width: int = 1024
    height: int = 1024
    seed: int = 42
    steps: int = 30
    cfg: float = 4.0
    flow_shift: float = 3.0
    sampler: str = "euler"

    def parameters(self) -> str:
        """The request in the words that picture viewers look for under "parameters"."""
        return (
            f"{self.prompt}\nNegative prompt: {self.negative}\nSteps: {self.steps}, Sampler: {self.sampler}, Schedule "
            f"type: simple, CFG scale: {self.cfg:g}, Seed: {self.seed}, Size: {self.width}x{self.height}, "
            f"Shift: {self.flow_shift:g}"
        )


def read_prompts(path: Path, sampler: str = "euler") -> list[PromptRequest]:
    """The pictures a prompt file asks for, with `sampler`, one of SAMPLERS, where it names none.

    Text: a prompt a line with flags after it; `#` lines and blank lines are skipped. TOML: [[prompt.subset]] tables,
    and [prompt] with what they share. JSON: a list of such tables or of lines. guidance, of
    distilled models, has no effect and is told once.
    Raises SettingError naming the file, the prompt and each value that cannot be used.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"sample_prompts = {path}: not a readable UTF-8 text file: {error}") from error
    common = {"sampler": SAMPLERS[sampler]}
    if path.suffix.lower() in (".toml", ".json"):
        wanted = [(f"{path}, prompt {number}", entry) for number, entry in enumerate(_tables(path, text), 1)]
    else:
        lines = [(f"{path}, line {number}", line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        wanted = [(where, line) for where, line in lines if line and not line.startswith("#")]
    if not wanted:
        raise SettingError(f"sample_prompts = {path}: holds no prompt.")
    problems: list[str] = []
    found = [
        {**common, **(_of_line if isinstance(each, str) else _of_table)(each, where, problems)}
        for where, each in wanted
    ]
    if problems:
        raise SettingError("\n".join(problems))
    if any(_IGNORED in values for values in found):
        logger.warning("%s: --g is for guidance-distilled models and has no effect on Anima; use --l for CFG.", path)
    return [PromptRequest(**{name: value for name, value in values.items() if name != _IGNORED}) for values in found]


def _tables(path: Path, text: str) -> list[Any]:
    """The prompts of a TOML or JSON file, as tables or lines."""
    try:
        content = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except ValueError as error:
        raise SettingError(f"sample_prompts = {path}: {error}") from error
    if isinstance(content, dict):
        shared = content.get("prompt")
        subsets = shared.get("subset", []) if isinstance(shared, dict) else []
        if isinstance(shared, dict) and not subsets and "prompt" in shared:
            subsets = [{}]
        own = {name: value for name, value in (shared if isinstance(shared, dict) else {}).items() if name != "subset"}
        content = [{**own, **subset} for subset in subsets]
    if not isinstance(content, list) or not all(isinstance(entry, dict | str) for entry in content):
        raise SettingError(f"sample_prompts = {path}: expected [[prompt.subset]] tables in TOML, or a list in JSON.")
    return content


def _of_line(line: str, where: str, problems: list[str]) -> dict[str, Any]:
    """What can be read of a line; what cannot is added to `problems`."""
    prompt, *flags = re.split(r"(?:^|\s+)--(?=\S)", line)
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for text in flags:
        flag, _, value = text.partition(" ")
        if flag not in _FLAGS:
            problems.append(f"{where}: unknown flag --{flag}; known: {', '.join('--' + name for name in _FLAGS)}.")
            continue
        field, _, parse = _FLAGS[flag]
        try:
            values[field] = parse(value.strip())
        except ValueError as error:
            problems.append(f"{where}: --{flag} {value}: {error}.")
    return values


def _of_table(table: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """What can be read of a table; what cannot is added to `problems`."""
    keys = {key: (field, parse) for field, key, parse in _FLAGS.values()} | {"prompt": ("prompt", str)}
    values: dict[str, Any] = {"prompt": ""}
    for key, value in table.items():
        if key not in keys:
            problems.append(f"{where}: unknown key {key}{did_you_mean(key, keys)}; known: {', '.join(keys)}.")
            continue
        field, parse = keys[key]
        try:
            values[field] = parse(str(value).strip())
        except ValueError as error:
            problems.append(f"{where}: {key} = {value}: {error}.")
    return values


def _side(text: str) -> int:
    if not text.isdecimal() or int(text) == 0 or int(text) % 16:
        raise ValueError("expected a multiple of 16, such as 1024")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError("expected a whole number from 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise ValueError("expected a whole number from 0")
    return int(text)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise ValueError("expected a number above 0")
    return value


def _sampler(text: str) -> str:
    if text not in SAMPLERS:
        raise ValueError(f"no such sampler; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[text]


_IGNORED = "guidance"
# Flag of a line -> field of PromptRequest, key of a table, and what makes the value of its text.
_FLAGS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "w": ("width", "width", _side),
    "h": ("height", "height", _side),
    "d": ("seed", "seed", _seed),
    "s": ("steps", "sample_steps", _count),
    "l": ("cfg", "scale", _scale),
    "g": (_IGNORED, "guidance_scale", _scale),
    "n": ("negative", "negative_prompt", str),
    "fs": ("flow_shift", "flow_shift", _scale),
    "ss": ("sampler", "sample_sampler", _sampler),
}
