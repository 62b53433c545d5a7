"""Drawn, captioned pictures: a training set that needs no download."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw

from library.randomness import python_random

COLOURS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (33, 97, 214),
    "yellow": (244, 208, 63),
    "purple": (142, 68, 173),
    "orange": (230, 126, 34),
    "black": (30, 30, 30),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "figure")
# Square, landscape, portrait and panorama, so that buckets have something to tell apart.
SIZES = ((160, 160), (192, 128), (128, 192), (256, 96))


def draw_training_set(folder: Path, pictures: int, seed: int) -> None:
    """Writes 001.png with its caption 001.txt, and so on; shapes and sizes take turns, colours are random."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        size, shape = SIZES[number % len(SIZES)], SHAPES[number % len(SHAPES)]
        picture, caption = draw_picture(size, shape, python_random(seed, "picture", number))
        picture.save(folder / f"{number + 1:03}.png")
        (folder / f"{number + 1:03}.txt").write_text(caption + "\n", encoding="utf-8")


def draw_picture(size: tuple[int, int], shape: str, chance: random.Random) -> tuple[Image.Image, str]:
    """One RGB picture of `size` (width, height), and the tags that say what is drawn."""
    colour, background = chance.sample(sorted(COLOURS), 2)
    picture = Image.new("RGB", size, COLOURS[background])
    width, height = size
    radius = min(size) * chance.uniform(0.25, 0.4)
    centre_x = chance.uniform(radius, width - radius)
    _draw_shape(ImageDraw.Draw(picture), shape, centre_x, height / 2, radius, COLOURS[colour])
    return picture, f"subject, {colour} {shape}, {background} background, simple, flat color"


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, int, int]
) -> None:
    """Draws a shape that fits the circle around (x, y), in pixels."""
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=colour)
    else:
        head = radius / 3
        draw.ellipse((x - head, top, x + head, top + 2 * head), fill=colour)
        draw.polygon([(x, top + head), (x + head * 2, bottom), (x - head * 2, bottom)], fill=colour)
