"""What becomes of sample pictures: a file each, a sheet of each time, and one that shows all times side by side."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.contact_sheets import can_grow, contact_sheet, grow_sheet
from library.files import write_atomically

logger = logging.getLogger(__name__)

# In output_dir.
SAMPLE_FOLDER = "sample"
# What the run's records call pictures with the adapter, without it, and all of a sampling on one sheet.
SAMPLE, BASE, SHEET = "sample/", "sample_base/", "sample/sheet"
# The step of pictures without the adapter, which stand before all others.
_BASE_STEP = -1


def sample_name(output_name: str) -> re.Pattern[str]:
    """Matches the whole name of every file in the sample folder of runs with that output_name."""
    name = re.escape(output_name)
    return re.compile(rf"{name}_(?:grid|(?:base|e?\d{{6}})_(?:sheet|\d+_\d{{14}}_\d+))\.png")


@dataclass(frozen=True)
class SamplePicture:
    """A rendered prompt. parameters: prompt and settings, as picture viewers read them."""

    picture: Image.Image
    seed: int
    parameters: str


@contextmanager
def telling_failures() -> Iterator[None]:
    """Inside, sampling may fail: that is told, and the run goes on."""
    try:
        yield
    except torch.OutOfMemoryError:
        logger.warning("sample pictures left out: out of GPU memory; give the prompts a lower --w and --h")
    except Exception as error:  # a full disk, a prompt that does not fit: nothing that training needs
        logger.warning("sample pictures left out: %s: %s", type(error).__name__, error)


class SampleFiles:
    """Writes a run's sample pictures into one folder.

    The first time, pictures without the adapter stand beside those with it.
    """

    def __init__(self, output_dir: Path, output_name: str, resumed: bool) -> None:
        """resumed: whether the sheet of all times is one to go on with."""
        self._folder = folder = output_dir / SAMPLE_FOLDER
        self._name = output_name
        self._grid = folder / f"{output_name}_grid.png"
        self._goes_on = resumed

    @property
    def needs_base(self) -> bool:
        """Whether this is the first time."""
        return not (self._goes_on and can_grow(self._grid))

    def write(
        self, tag: str, step: int, samples: Sequence[SamplePicture], base: Sequence[SamplePicture] | None
    ) -> Iterator[tuple[str, Image.Image, str]]:
        """Writes all files, and gives each picture with a name for the run's records, and its parameters.

        Those names are SAMPLE and BASE with the prompt's number, and SHEET.
        """
        if not self._goes_on:
            self._grid.unlink(missing_ok=True)
            self._goes_on = True
        columns = []
        for own_tag, own_step, words, own in (
            ("base", _BASE_STEP, "base model", base or ()),
            (tag, step, f"step {step}", samples),
        ):
            for number, sample in enumerate(own):
                self._write_one(own_tag, number, sample, step if own is samples else None)
                yield f"{BASE if own is base else SAMPLE}{number:02d}", sample.picture, sample.parameters
            if own:
                columns.append((own_step, words, [sample.picture for sample in own]))
        sheet = contact_sheet([(words, pictures) for _, words, pictures in columns])
        write_atomically(self._folder / f"{self._name}_{tag}_sheet.png", lambda file: sheet.save(file, format="PNG"))
        grow_sheet(self._grid, columns)
        logger.info("samples over time: %s", self._grid.resolve())
        yield SHEET, sheet, ""

    def _write_one(self, tag: str, number: int, sample: SamplePicture, step: int | None) -> None:
        text = PngInfo()
        text.add_text("parameters", sample.parameters)
        text.add_text("adapter", "none" if step is None else f"{self._name}, step {step}")
        path = self._folder / f"{self._name}_{tag}_{number:02d}_{datetime.now():%Y%m%d%H%M%S}_{sample.seed}.png"
        write_atomically(path, lambda file: sample.picture.save(file, format="PNG", pnginfo=text))
        logger.info("sample: %s", path.resolve())
