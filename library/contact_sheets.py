"""Sheets of small pictures with a word above each, and a sheet that gains a column each time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from library.files import write_atomically

# Pixels: the width of a picture on a sheet, the room between two, and that for words above a column.
_WIDTH, _GAP, _WORDS = 320, 8, 24
# A sheet with more columns than this loses every second one, so that it can be opened after a long run.
MOST_COLUMNS = 48


def contact_sheet(columns: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Columns of pictures, each with words above it; pictures that stand side by side are of one shape."""
    small = [(words, [_small(picture) for picture in pictures]) for words, pictures in columns]
    heights = [picture.height for picture in small[0][1]]
    size = (_GAP + len(columns) * (_WIDTH + _GAP), _WORDS + sum(height + _GAP for height in heights))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (words, pictures) in enumerate(small):
        left, top = _GAP + number * (_WIDTH + _GAP), _WORDS
        draw.text((left, 4), words, fill="black", font=font)
        for picture, height in zip(pictures, heights, strict=True):
            sheet.paste(picture, (left, top))
            top += height + _GAP
    return sheet


def grow_sheet(path: Path, columns: Sequence[tuple[int, str, Sequence[Image.Image]]]) -> Image.Image:
    """Adds columns (step, words, pictures) to the sheet at `path`, which is made where it is not there.

    Its own columns from the first new step on make room, as those of a run that went on from an earlier state. A sheet
    of other pictures is replaced.
    """
    added = contact_sheet([(words, pictures) for _, words, pictures in columns])
    steps = [step for step, _, _ in columns]
    old_steps, old = _read(path, added.height)
    kept = [number for number, step in enumerate(old_steps) if step < steps[0]]
    parts = [(old_steps[number], old, number) for number in kept]
    parts += [(step, added, number) for number, step in enumerate(steps)]
    while len(parts) > MOST_COLUMNS:
        parts = [*parts[:-1:2], parts[-1]]
    sheet = Image.new("RGB", (_GAP + len(parts) * (_WIDTH + _GAP), added.height), "white")
    for number, (_, source, place) in enumerate(parts):
        left = place * (_WIDTH + _GAP)
        sheet.paste(source.crop((left, 0, left + _WIDTH + _GAP, added.height)), (number * (_WIDTH + _GAP), 0))
    text = PngImagePlugin.PngInfo()
    text.add_text("steps", json.dumps([step for step, _, _ in parts]))
    write_atomically(path, lambda file: sheet.save(file, format="PNG", pnginfo=text))
    return sheet


def can_grow(path: Path) -> bool:
    """Whether there is a sheet that `grow_sheet` made."""
    return bool(_read(path, None)[0])


def _read(path: Path, height: int | None) -> tuple[list[int], Image.Image | None]:
    """The steps of a sheet's columns, and the sheet; no steps where it is missing, foreign or not of that height."""
    try:
        with Image.open(path) as sheet:
            steps = json.loads(sheet.text["steps"])
            fits = sheet.width == _GAP + len(steps) * (_WIDTH + _GAP) and height in (None, sheet.height)
            return (steps, sheet.convert("RGB")) if fits else ([], None)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return [], None


def _small(picture: Image.Image) -> Image.Image:
    height = max(1, round(picture.height * _WIDTH / picture.width))
    return picture.convert("RGB").resize((_WIDTH, height), Image.Resampling.LANCZOS)
