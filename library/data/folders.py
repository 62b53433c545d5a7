"""Finding pictures in folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from library.data.settings import SubsetSettings
from library.errors import DataError

# A file with one of these endings counts as a picture even where Pillow lacks its reader (.jxl needs a plugin): it is
# then reported as unreadable instead of being left out unnoticed.
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")


def pictures_in(folder: Path) -> list[Path]:
    """The folder's own pictures, sorted by name; hidden files do not count. A missing folder raises DataError."""
    if not folder.is_dir():
        raise DataError(f"picture folder {folder} does not exist: correct image_dir or train_data_dir")
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in PICTURE_ENDINGS and not path.name.startswith(".") and path.is_file()
    )


def find_subsets(root: Path, common: SubsetSettings) -> tuple[SubsetSettings, ...]:
    """One subset for `root` and for each folder below it that holds pictures, in sorted order.

    A folder named like '10_subject' repeats its pictures 10 times, and 'subject' is the caption of those without a
    caption file unless `common` sets class_tokens; everything else is as in `common`. DataError: no picture anywhere.
    """
    subsets = tuple(_subset(folder, common) for folder in _folders(root) if pictures_in(folder))
    if not subsets:
        raise DataError(f"no pictures in {root} or the folders below it (looked for {', '.join(PICTURE_ENDINGS)})")
    return subsets


def _subset(folder: Path, common: SubsetSettings) -> SubsetSettings:
    numbered = re.fullmatch(r"(\d+)_(.*)", folder.resolve().name)
    if numbered is None:
        return replace(common, image_dir=folder)
    if int(numbered[1]) == 0:
        raise DataError(f"the name of folder {folder} asks for 0 repeats: give 1 or more, or move it elsewhere")
    class_tokens = common.class_tokens if common.class_tokens is not None else numbered[2].strip()
    return replace(common, image_dir=folder, num_repeats=int(numbered[1]), class_tokens=class_tokens)


def _folders(root: Path) -> Iterator[Path]:
    """`root` and the folders below it, links followed once each, hidden ones left out."""
    if not root.is_dir():
        raise DataError(f"picture folder {root} does not exist: correct train_data_dir")
    seen = set()
    for folder, names, _ in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        names[:] = sorted(name for name in names if not name.startswith(".")) if real not in seen else []
        if real not in seen:
            seen.add(real)
            yield Path(folder)
