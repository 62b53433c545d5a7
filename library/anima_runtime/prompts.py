"""Sample prompts in Kohya's form: one a line, with flags after the text."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import SettingError

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


def parse_prompt_lines(path: Path) -> list[PromptRequest]:
    """The pictures a prompt file asks for; `#` lines and blank lines are skipped.

    Flags: --w width, --h height (multiples of 16), --d seed, --s steps, --l CFG scale, --n negative prompt,
    --fs flow shift; --g, the guidance of distilled models, has no effect and is told once.
    Raises SettingError naming the file, and the line and flag that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"sample_prompts = {path}: not a readable UTF-8 text file: {error}") from error
    if path.suffix in (".toml", ".json"):
        raise SettingError(f"sample_prompts = {path}: prompts are read from a plain text file, one prompt a line.")
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    wanted = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not wanted:
        raise SettingError(f"sample_prompts = {path}: holds no prompt.")
    if any(re.search(r"\s--g\s", line) for _, line in wanted):
        logger.warning("%s: --g is for guidance-distilled models and has no effect on Anima; use --l for CFG.", path)
    return [_parse_line(line, f"{path}, line {number}") for number, line in wanted]


def _parse_line(line: str, where: str) -> PromptRequest:
    prompt, *flags = re.split(r"(?:^|\s+)--(?=\S)", line)
    values: dict[str, Any] = {}
    for text in flags:
        flag, _, value = text.partition(" ")
        if flag not in _FLAGS:
            raise SettingError(f"{where}: unknown flag --{flag}; known: {', '.join('--' + name for name in _FLAGS)}.")
        field, parse = _FLAGS[flag]
        try:
            values[field] = parse(value.strip())
        except ValueError as error:
            raise SettingError(f"{where}: --{flag} {value}: {error}.") from error
    values.pop(_IGNORED, None)
    return PromptRequest(prompt.strip(), **values)


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


_IGNORED = "guidance"
_FLAGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "w": ("width", _side),
    "h": ("height", _side),
    "d": ("seed", _seed),
    "s": ("steps", _count),
    "l": ("cfg", _scale),
    "g": (_IGNORED, _scale),
    "n": ("negative", str),
    "fs": ("flow_shift", _scale),
}
