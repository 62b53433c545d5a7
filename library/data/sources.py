"""The picture files of a run with what belongs to each, before any of them is opened."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from library.data.caption_fields import CaptionFields, fields_from_files, fields_from_metadata
from library.data.folders import PICTURE_ENDINGS, pictures_in, warn_of_unread
from library.data.metadata_files import PictureMetadata, read_metadata_file
from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import DataError, counted, first_ten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A picture file of a subset.

    key: "dataset/subset/file name". fields: what is written of it; a line each, unless wildcards draw lines.
    size: (width, height) where a metadata file tells it. mask: the file with its mask.
    """

    key: str
    path: Path
    fields: CaptionFields
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
                Source(f"{place}/{name}", path, fields, size, masks.get(path.stem) if masks else None, dataset, subset)
                for name, path, fields, size in list_pictures(subset)
            ]
    if not found:
        raise DataError("there are no datasets with subsets: give train_data_dir or dataset_config")
    _check_masks(found)
    warn_of_unread(subset.image_dir for settings in datasets for subset in settings.subsets if subset.image_dir)
    return found


# Name within the subset, path, what is written of it, size
_Listed = tuple[str, Path, CaptionFields, tuple[int, int] | None]


def _from_folder(subset: SubsetSettings) -> list[_Listed]:
    paths = pictures_in(subset.image_dir)
    if not paths:
        raise DataError(
            f"no pictures directly in image_dir {subset.image_dir} (looked for {', '.join(PICTURE_ENDINGS)})"
        )
    fields, unreadable = [], []
    for path in paths:
        try:
            fields.append(fields_from_files(path, subset))
        except DataError as error:
            unreadable.append(str(error))
    if unreadable:
        files = counted(len(unreadable), "caption file", "caption files")
        raise DataError(f"{files} cannot be read:\n{listed(unreadable)}")
    if subset.caption_mix is None:
        _warn_of_unused_files(paths, subset)
    own = _checked_fields([str(path) for path in paths], fields, subset, f"file ({subset.caption_extension})")
    return [(path.name, path, each, None) for path, each in zip(paths, own, strict=True)]


def _checked_fields(
    names: Sequence[str], found: Sequence[CaptionFields], subset: SubsetSettings, place: str
) -> list[CaptionFields]:
    """The fields as they are trained; says what is missing in the place they come from, and which lines are unused."""
    missing, cut, without = [], [], {"tags": [], "natural language": []}
    for name, fields in zip(names, found, strict=True):
        if fields.tags is None and fields.nl is None:
            missing.append(name)
        elif subset.caption_mix is not None and not (fields.tags and fields.nl):
            without["natural language" if fields.tags else "tags"].append(name)
        if not subset.enable_wildcard and "\n" in f"{fields.tags}{fields.nl}":
            cut.append(name)
    gets = "it gets" if len(missing) == 1 else "they get"
    caption = f'"{subset.class_tokens}", by class_tokens' if subset.class_tokens else "an empty caption"
    _warn(missing, "picture has", "pictures have", f"no caption {place}; {gets} {caption}")
    for field, lacking in without.items():
        _warn(lacking, "picture has", "pictures have", f"no {field}; caption_mix uses the other in each form")
    _warn(
        cut, "caption has", "captions have",
        "several lines, of which the first is used; enable_wildcard would draw one each time",
    )  # fmt: skip
    return list(found) if subset.enable_wildcard else [fields.first_lines() for fields in found]


def _warn_of_unused_files(paths: Sequence[Path], subset: SubsetSettings) -> None:
    """Natural language that nothing asks for."""
    beside = {path.name for path in subset.image_dir.glob(f"*{escape(subset.nl_extension)}")}
    unused = [name for path in paths if (name := path.stem + subset.nl_extension) in beside] if beside else []
    if subset.nl_extension != subset.caption_extension:
        _warn(unused, "file", "files", "of natural language not used: set caption_mix")


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
    _warn_of_unused_texts(entries, subset)
    found = [fields_from_metadata(entry, subset) for entry in entries]
    fields = _checked_fields([entry.name for entry in entries], found, subset, f"in {subset.metadata_file}")
    return [(entry.name, entry.path, own, entry.size) for entry, own in zip(entries, fields, strict=True)]


def _warn_of_unused_texts(entries: Sequence[PictureMetadata], subset: SubsetSettings) -> None:
    """What a metadata file says of pictures in vain."""
    if subset.caption_mix is None:
        unused, why = [entry.name for entry in entries if entry.nl], "nl: set caption_mix to use it"
    else:
        unused = [entry.name for entry in entries if entry.caption and entry.tags and entry.nl]
        why = "caption: caption_mix uses tags and nl"
    _warn(unused, "picture", "pictures", f"in {subset.metadata_file} with an unused {why}")


def _warn_of_unnamed(entries: Sequence[PictureMetadata], subset: SubsetSettings) -> None:
    """Pictures beside the named ones that the file does not name."""
    named = {entry.path for entry in entries}
    beside = [path for folder in {path.parent for path in named} for path in pictures_in(folder)]
    unnamed = sorted(str(path) for path in beside if path not in named)
    _warn(unnamed, "picture is", "pictures are", f"not in {subset.metadata_file}, and not trained")


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
        pictures = counted(len(without), "picture has", "pictures have")
        raise DataError(f"{pictures} no mask; draw one, white for a whole picture:\n{listed(names)}")


def _warn(names: Sequence[str], one: str, several: str, what: str) -> None:
    if names:
        logger.warning("%s %s:\n%s", counted(len(names), one, several), what, listed(names))


def listed(names: Sequence[str]) -> str:
    """The first ten, each on a line."""
    return "  " + first_ten(names, "\n  ")
