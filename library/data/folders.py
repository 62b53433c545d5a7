"""Finding pictures in folders."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from library.data.settings import SubsetSettings
from library.errors import DataError

logger = logging.getLogger(__name__)

# A file with one of these endings counts as a picture even where Pillow lacks its reader (.jxl and .heic need plugins):
# it is then reported as unreadable instead of being left out unnoticed.
PICTURE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl", ".heic", ".heif"
)  # fmt: skip
# Pictures in the form their programs and cameras keep them: not trained, and said so.
_SOURCE_ENDINGS = (
    ".psd", ".psb", ".clip", ".xcf", ".kra", ".sai", ".sai2", ".svg", ".ai", ".eps", ".tga", ".ico", ".jp2", ".exr",
    ".hdr", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".rw2", ".orf", ".apng", ".pdf",
)  # fmt: skip


def pictures_in(folder: Path) -> list[Path]:
    """The folder's own pictures, sorted by name; hidden files do not count. A missing folder raises DataError."""
    if not folder.is_dir():
        raise DataError(f"picture folder {folder} does not exist: correct image_dir or train_data_dir")
    return [folder / name for name in sorted(_files(folder)) if _ending(name) in PICTURE_ENDINGS]


def folder_of(path: Path) -> str:
    """The folder that a file lies in, as text: 100,000 paths of folders take a second to make and to compare."""
    return os.path.dirname(path)  # noqa: PTH120


def unread_in(folder: Path) -> list[Path]:
    """The folder's files that hold pictures of kinds that are not read, sorted by name."""
    return [folder / name for name in sorted(_files(folder)) if _ending(name) in _SOURCE_ENDINGS]


def warn_of_unread(folders: Iterable[Path]) -> None:
    """Names the kinds of such files in these folders."""
    for folder in dict.fromkeys(folders):
        kinds = Counter(_ending(path.name) for path in unread_in(folder))
        if kinds:
            counted = ", ".join(f"{count} {ending}" for ending, count in sorted(kinds.items()))
            logger.warning("%s: files of kinds that are not read are left out (%s): save them as .png", folder, counted)


def _files(folder: Path) -> Iterator[str]:
    """Names, as 100,000 paths take some seconds to make."""
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())


def _ending(name: str) -> str:
    _, dot, ending = name.rpartition(".")
    return (dot + ending).lower()


def find_subsets(root: Path, common: SubsetSettings) -> tuple[SubsetSettings, ...]:
    """One subset for `root` and for each folder below it that holds pictures, in sorted order.

    A folder named like '10_subject' repeats its pictures 10 times, and 'subject' is the caption of those without a
    caption file unless `common` sets class_tokens; everything else is as in `common`. DataError: no picture anywhere.
    """
    folders = list(_folders(root))
    subsets = tuple(_subset(folder, common) for folder in folders if pictures_in(folder))
    if not subsets:
        raise DataError(f"no pictures in {root} or the folders below it (looked for {', '.join(PICTURE_ENDINGS)})")
    with_pictures = {subset.image_dir for subset in subsets}
    warn_of_unread(folder for folder in folders if folder not in with_pictures)
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
