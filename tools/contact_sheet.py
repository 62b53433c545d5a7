"""A picture of what the trainer will see: each picture as it is cropped and masked, with the captions it gets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from library.data.dataset import TrainingBatches
from library.data.pictures import Picture
from library.errors import DataError
from library.files import write_atomically

# Pixels of a cell's width, of the picture in it and of a line of text; letters in a line, and most lines.
_CELL = 272
_PICTURE = 256
_FONT_SIZE = 12
_LINE = 15
_LETTERS = 44
_LINES = 9
# What is not trained is shown at a quarter of its brightness, with this added.
_RED = (80.0, 0.0, 0.0)


@dataclass(frozen=True)
class Cell:
    """One use of a picture. title: its file and size."""

    image: Image.Image
    title: str
    caption: str


def save_contact_sheet(
    path: Path, pictures: Sequence[Picture], batch_sizes: Sequence[int], seed: int, draws: int, most: int
) -> int:
    """Writes a sheet with a row for each of at most `most` pictures, taken evenly, and a column for each epoch.

    Returns how many pictures it shows. DataError: the file cannot be written, or a picture cannot be read.
    """
    shown = [pictures[len(pictures) * number // most] for number in range(most)] if len(pictures) > most else pictures
    rows = _cells(shown, batch_sizes, seed, draws)
    heights = [max(map(_height, rows[picture.key])) for picture in shown]
    sheet, top = Image.new("RGB", (_CELL * draws, sum(heights)), "white"), 0
    for picture, height in zip(shown, heights, strict=True):
        for column, cell in enumerate(rows[picture.key]):
            _draw_cell(sheet, cell, _CELL * column, top)
        top += height
    try:
        write_atomically(path, sheet.save)
    except (OSError, ValueError) as error:
        raise DataError(f"--contact_sheet {path}: the picture cannot be written: {error}") from error
    return len(shown)


def _cells(pictures: Sequence[Picture], batch_sizes: Sequence[int], seed: int, draws: int) -> dict[str, list[Cell]]:
    """{picture's key: its cells}, of the first use in each epoch, loaded by what loads them for training."""
    size_of = {picture.key: picture.size for picture in pictures}
    batches, cells = TrainingBatches(pictures, batch_sizes, seed), {key: [] for key in size_of}
    for epoch in range(draws):
        for batch in (batch for step in batches.epoch(epoch) for batch in step.batches):
            for row, (_, key, repeat) in enumerate(batch.keys):
                if repeat == 0:
                    mask = None if batch.loss_mask_B1HW is None else batch.loss_mask_B1HW[row, 0]
                    width, height = size_of[key]
                    title = f"{batch.paths[row].name}  {width}x{height} > {batch.bucket[0]}x{batch.bucket[1]}"
                    image = _shown(batch.pixels_BCHW[row], mask)
                    cells[key].append(Cell(image, title, batch.captions[row]))
    return cells


def _shown(pixels_CHW: Tensor, weights_HW: Tensor | None) -> Image.Image:
    """pixels in [-1, 1]; weights: of the loss, on a coarser grid."""
    image_HWC = (pixels_CHW.permute(1, 2, 0) + 1) * 127.5
    if weights_HW is not None:
        trained = weights_HW / weights_HW.max().clamp(min=1e-6)
        fine = torch.nn.functional.interpolate(trained[None, None], size=image_HWC.shape[:2])[0, 0, :, :, None]
        image_HWC = fine * image_HWC + (1 - fine) * (0.25 * image_HWC + torch.tensor(_RED))
    image = Image.fromarray(image_HWC.round().clamp(0, 255).to(torch.uint8).numpy())
    image.thumbnail((_PICTURE, _PICTURE))
    return image


def _height(cell: Cell) -> int:
    return _LINE * (len(_caption_lines(cell.caption)) + 2) + cell.image.height


def _draw_cell(sheet: Image.Image, cell: Cell, left: int, top: int) -> None:
    font, draw = ImageFont.load_default(_FONT_SIZE), ImageDraw.Draw(sheet)
    draw.text((left + 4, top), textwrap.shorten(cell.title, _LETTERS, placeholder="…"), "gray", font)
    sheet.paste(cell.image, (left + 4, top + _LINE))
    top += _LINE + cell.image.height + 2
    for number, line in enumerate(_caption_lines(cell.caption)):
        draw.text((left + 4, top + _LINE * number), line, "black", font)


def _caption_lines(caption: str) -> list[str]:
    lines = textwrap.wrap(caption, _LETTERS) or ["(no caption)"]
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"… {len(caption)} letters in all"]
