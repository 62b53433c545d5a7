"""Which pictures a run trains on: found, read through once, captioned and put into buckets before any model loads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from library.console import progress_bar
from library.data.buckets import bucket_sizes, choose_bucket
from library.data.captions import read_caption_lines
from library.data.folders import PICTURE_ENDINGS, pictures_in
from library.data.pixels import read_size
from library.data.settings import DatasetSettings, SubsetSettings
from library.errors import DataError, first_ten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """One picture of one subset.

    key: "dataset/subset/file name"; random choices follow from it, so it holds nothing that depends on the machine.
    caption: the first line of the caption file, else class_tokens, else "".
    size, bucket: (width, height) in pixels, of the upright picture and of what is trained.
    dataset: which dataset it belongs to, counted from 0.
    """

    key: str
    path: Path
    caption: str
    size: tuple[int, int]
    bucket: tuple[int, int]
    dataset: int
    subset: SubsetSettings

    @property
    def repeats(self) -> int:
        """How often an epoch shows it."""
        return self.subset.num_repeats


@dataclass(frozen=True)
class _Found:
    """A picture file that was not opened yet."""

    key: str
    path: Path
    dataset: int
    subset: SubsetSettings

    @property
    def caption_path(self) -> Path:
        return self.path.with_name(self.path.stem + self.subset.caption_extension)


def scan_datasets(
    datasets: Sequence[DatasetSettings], skip_broken: bool, show_progress: bool = True
) -> tuple[Picture, ...]:
    """Every picture of every subset, in a fixed order (dataset, subset, file name).

    Each picture is decoded once, so that a damaged file is found now rather than in the middle of training.
    DataError: a folder is missing or holds no pictures; pictures are unreadable (all of them in one message, unless
    skip_broken leaves them out with a warning); a caption file is not UTF-8. SettingError: see `bucket_sizes`.
    """
    buckets = [bucket_sizes(dataset) for dataset in datasets]
    readable = _read_sizes(_find(datasets), skip_broken, show_progress)
    captions = _read_captions([found for found, _ in readable])
    return tuple(
        Picture(
            key=found.key,
            path=found.path,
            caption=caption,
            size=size,
            bucket=choose_bucket(size, buckets[found.dataset], datasets[found.dataset]),
            dataset=found.dataset,
            subset=found.subset,
        )
        for (found, size), caption in zip(readable, captions, strict=True)
    )


def _find(datasets: Sequence[DatasetSettings]) -> list[_Found]:
    found = []
    for dataset_index, dataset in enumerate(datasets):
        for subset_index, subset in enumerate(dataset.subsets):
            paths = pictures_in(subset.image_dir)
            if not paths:
                raise DataError(
                    f"no pictures directly in image_dir {subset.image_dir} (looked for {', '.join(PICTURE_ENDINGS)})"
                )
            place = f"{dataset_index}/{subset_index}"
            found += [_Found(f"{place}/{path.name}", path, dataset_index, subset) for path in paths]
    if not found:
        raise DataError("there are no datasets with subsets: give train_data_dir or dataset_config")
    return found


def _read_sizes(
    found: Sequence[_Found], skip_broken: bool, show_progress: bool
) -> list[tuple[_Found, tuple[int, int]]]:
    """The pictures that can be read, with their sizes; Pillow decodes outside the GIL, so threads share the work."""
    with ThreadPoolExecutor() as pool, progress_bar(len(found), "reading pictures", shown=show_progress) as bar:
        sizes = []
        for size in pool.map(_size_or_reason, [each.path for each in found]):
            sizes.append(size)
            bar.update()
    broken = [size for size in sizes if isinstance(size, str)]
    if broken and not skip_broken:
        advice = "repair or remove them, or set skip_broken_images = true to train without them"
        raise DataError(f"{len(broken)} pictures cannot be read: {advice}\n{_listed(broken)}")
    readable = [(each, size) for each, size in zip(found, sizes, strict=True) if not isinstance(size, str)]
    if not readable:
        raise DataError(f"none of the {len(found)} pictures can be read:\n{_listed(broken)}")
    if broken:
        logger.warning("%d pictures cannot be read and are left out:\n%s", len(broken), _listed(broken))
    return readable


def _size_or_reason(path: Path) -> tuple[int, int] | str:
    try:
        return read_size(path)
    except DataError as error:
        return str(error)


def _read_captions(found: Sequence[_Found]) -> list[str]:
    captions, missing, cut, unreadable = [], [], [], []
    for each in found:
        if not each.caption_path.is_file():
            missing.append(f"{each.path} (no {each.caption_path.name})")
            captions.append(each.subset.class_tokens or "")
            continue
        try:
            lines = read_caption_lines(each.caption_path)
        except DataError as error:
            unreadable.append(str(error))
            continue
        captions.append(lines[0] if lines else "")
        if len(lines) > 1:
            cut.append(str(each.caption_path))
    if unreadable:
        raise DataError(f"{len(unreadable)} caption files cannot be read:\n{_listed(unreadable)}")
    _warn(missing, "pictures have no caption file; they get class_tokens, or an empty caption where that is not set")
    _warn(cut, "caption files have several lines; only the first is used")
    return captions


def _warn(names: Sequence[str], what: str) -> None:
    if names:
        logger.warning("%d %s:\n%s", len(names), what, _listed(names))


def _listed(names: Sequence[str]) -> str:
    return "  " + first_ten(names, "\n  ")
