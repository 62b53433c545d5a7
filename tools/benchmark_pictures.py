"""Captioned pictures of a photo's size and detail, made up, to time the preparation of data with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from library.data.pictures import Picture, scan_datasets
from library.data.settings import DatasetSettings, SubsetSettings
from library.randomness import python_random
from tools.tiny_tokenizers import TAGS

# Of a caption: about 120 tokens.
_WORDS = 60


def drawn_pictures(folder: Path, count: int, side: int, lines: int = 1) -> tuple[Picture, ...]:
    """Pictures of a photo's size and detail as PNG files, each with a caption of one or more lines to draw from."""
    folder.mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda number: _draw(folder / f"{number:04}.png", number, side, lines), range(count)))
    subset = SubsetSettings(image_dir=folder, enable_wildcard=lines > 1, num_repeats=10)
    dataset = DatasetSettings(resolution=(side, side), subsets=(subset,))
    return scan_datasets([dataset], skip_broken=False, show_progress=False)


def _draw(path: Path, number: int, side: int, lines: int) -> None:
    """Smooth colours with a little noise: about 2 MB at 1024x1024."""
    random = np.random.default_rng(number)
    smooth = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
    noise = random.integers(-6, 7, (side, side, 3))
    Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
    words = [word for word in TAGS.split() if word.isalpha()]
    chance = python_random(0, "caption", number)
    captions = [", ".join(chance.choices(words, k=_WORDS)) for _ in range(lines)]
    path.with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
