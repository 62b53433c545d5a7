"""What a caption leaves open: which of its lines is used, and the wildcards in it."""

from __future__ import annotations

import re
from random import Random

_ESCAPED = re.compile(r"\{\{([^{}]*)\}\}")
_INNERMOST = re.compile(r"\{([^{}]+)\}")
# They stand for the braces of {{...}} until everything is drawn; Unicode gives these characters no meaning.
_OPEN, _CLOSE = "\ue000", "\ue001"


def text_lines(text: str) -> list[str]:
    """The lines that hold text, stripped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def draw_line(text: str, random: Random) -> str:
    """One of the text's lines, all equally likely, with its wildcards drawn."""
    return draw_wildcards(random.choice(text.split("\n")), random)


def draw_wildcards(text: str, random: Random) -> str:
    """Replaces each {red|blue|dark green} by one of its choices, all equally likely; choices may hold wildcards.

    As in Kohya's scripts, {{text}} becomes {text} as it is, {text} becomes text, and {} and lone braces stay.
    """
    before = None
    while text != before:
        before = text
        text = _ESCAPED.sub(rf"{_OPEN}\1{_CLOSE}", text)
        text = _INNERMOST.sub(lambda match: random.choice(match[1].split("|")), text)
    return text.replace(_OPEN, "{").replace(_CLOSE, "}")
