"""The picture files of a run with what belongs to each, before any of them is opened."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data.captions import read_caption_lines
from library.data.folders import PICTURE_ENDINGS, pictures_in, warn_of_unread
from library.data.metadata_files import PictureMetadata, read_metadata_file
from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import DataError, first_ten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A picture file of a subset.

    key: "dataset/subset/file name". caption: None where there is none. size: (width, height) where a metadata file
    tells it. mask: the file with its mask.
    """

    key: str
    path: Path
    caption: str | None
    size: tuple[int, int] | None
    mask: Path | None
    dataset: int
    subset: SubsetSettings


def find_sources(datasets: Sequence[DatasetSettings]) -> list[Source]:
    """Every picture of every subset, in a fixed order (dataset, subset, file name or the metadata file's order).

    DataError: a folder or a metadata file is missing, is unusable or gives no pictures; a picture that a metadata file
    names is missing; a caption is not UTF-8; a mask is missing. Missing captions are warned of.
    """
    found: list[Source] = []
    for dataset, settings in enumerate(datasets):
        for number, subset in enumerate(settings.subsets):
            place = f"{dataset}/{number}"
            list_pictures = _from_folder if subset.metadata_file is None else _from_metadata
            masks = _masks(subset)
            found += [
                Source(f"{place}/{name}", path, caption, size, masks.get(path.stem), dataset, subset)
                for name, path, caption, size in list_pictures(subset)
            ]
    if not found:
        raise DataError("there are no datasets with subsets: give train_data_dir or dataset_config")
    _check_masks(found)
    warn_of_unread(subset.image_dir for settings in datasets for subset in settings.subsets if subset.image_dir)
    return found


# Name within the subset, path, caption, size
_Listed = tuple[str, Path, str | None, tuple[int, int] | None]


def _from_folder(subset: SubsetSettings) -> list[_Listed]:
    paths = pictures_in(subset.image_dir)
    if not paths:
        raise DataError(
            f"no pictures directly in image_dir {subset.image_dir} (looked for {', '.join(PICTURE_ENDINGS)})"
        )
    return [(path.name, path, caption, None) for path, caption in zip(paths, _captions(paths, subset), strict=True)]


def _captions(paths: Sequence[Path], subset: SubsetSettings) -> list[str | None]:
    captions, missing, cut, unreadable = [], [], [], []
    for path in paths:
        caption_path = path.with_name(path.stem + subset.caption_extension)
        try:
            lines = read_caption_lines(caption_path) if caption_path.is_file() else None
        except DataError as error:
            unreadable.append(str(error))
            continue
        if lines is None:
            missing.append(f"{path} (no {caption_path.name})")
        elif len(lines) > 1:
            cut.append(str(caption_path))
        captions.append(None if lines is None else "".join(lines[:1]))
    if unreadable:
        raise DataError(f"{len(unreadable)} caption files cannot be read:\n{listed(unreadable)}")
    _warn(missing, "pictures have no caption file; they get class_tokens, or an empty caption where that is not set")
    _warn(cut, "caption files have several lines; only the first is used")
    return captions


def _from_metadata(subset: SubsetSettings) -> list[_Listed]:
    entries = read_metadata_file(subset.metadata_file, subset.image_dir)
    if not entries:
        raise DataError(f"metadata_file {subset.metadata_file} names no pictures")
    absent = [entry.name for entry in entries if entry.path is None]
    if absent:
        raise DataError(
            f"metadata_file {subset.metadata_file} names {len(absent)} pictures that are not there, of {len(entries)}: "
            f"put them below image_dir, or take them out\n{listed(absent)}"
        )
    twice = [str(path) for path, count in Counter(entry.path for entry in entries).items() if count > 1]
    if twice:
        raise DataError(f"metadata_file {subset.metadata_file} names pictures twice; keep one each\n{listed(twice)}")
    _warn_of_unnamed(entries, subset)
    captions = [entry.whole_caption(subset.caption_separator) for entry in entries]
    missing = [entry.name for entry, caption in zip(entries, captions, strict=True) if caption is None]
    _warn(missing, f"pictures have no caption in {subset.metadata_file}; they get class_tokens, or an empty caption")
    return [(entry.name, entry.path, caption, entry.size) for entry, caption in zip(entries, captions, strict=True)]


def _warn_of_unnamed(entries: Sequence[PictureMetadata], subset: SubsetSettings) -> None:
    """Pictures beside the named ones that the file does not name."""
    named = {entry.path for entry in entries}
    beside = [path for folder in {path.parent for path in named} for path in pictures_in(folder)]
    unnamed = sorted(str(path) for path in beside if path not in named)
    _warn(unnamed, f"pictures are not in {subset.metadata_file}, and are not trained")


def _masks(subset: SubsetSettings) -> dict[str, Path]:
    """Masks by the stem of their names."""
    if subset.conditioning_data_dir is None:
        return {}
    return {path.stem: path for path in pictures_in(subset.conditioning_data_dir)}


def _check_masks(sources: Sequence[Source]) -> None:
    without = [each for each in sources if each.subset.conditioning_data_dir is not None and each.mask is None]
    if without:
        names = [
            f"{each.path} (nothing named {each.path.stem} in {each.subset.conditioning_data_dir})" for each in without
        ]
        raise DataError(f"{len(without)} pictures have no mask; draw one, white for a whole picture:\n{listed(names)}")


def _warn(names: Sequence[str], what: str) -> None:
    if names:
        logger.warning("%d %s:\n%s", len(names), what, listed(names))


def listed(names: Sequence[str]) -> str:
    """The first ten, each on a line."""
    return "  " + first_ten(names, "\n  ")
