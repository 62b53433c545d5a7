"""Which pictures a run trains on: found, measured, captioned and put into buckets before any model loads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from library.data.buckets import bucket_sizes, choose_bucket
from library.data.header_reading import read_headers
from library.data.headers import PictureHeader
from library.data.picture_index import PictureIndex
from library.data.settings import DatasetSettings, SubsetSettings
from library.data.sources import Source, find_sources, listed
from library.errors import DataError, counted
from library.garbage import uncollected

logger = logging.getLogger(__name__)

# A mask may be of another size than its picture, but of no other shape: widths over heights differ by this at most.
_MASK_SHAPE = 0.02


@dataclass(frozen=True)
class Picture:
    """One picture of one subset at one size.

    key: "dataset/subset/file name", with "@768x768" where the dataset trains at several resolutions; random choices
    follow from it, so it holds nothing that depends on the machine.
    caption: what is written of it, else class_tokens, else ""; with caption_mix its tags, and nl its natural language.
    Of several lines the first, or with enable_wildcard all.
    size, bucket: (width, height) in pixels, of the upright picture and of what is trained.
    dataset: which dataset it belongs to, counted from 0. mask: the file of its mask.
    extra_repeats: how often an epoch shows it beyond its subset's num_repeats.
    """

    key: str
    path: Path
    caption: str
    size: tuple[int, int]
    bucket: tuple[int, int]
    dataset: int
    subset: SubsetSettings
    nl: str = ""
    mask: Path | None = None
    extra_repeats: int = 0

    @property
    def repeats(self) -> int:
        """How often an epoch shows it."""
        return self.subset.num_repeats + self.extra_repeats


@uncollected()
def scan_datasets(
    datasets: Sequence[DatasetSettings],
    skip_broken: bool,
    show_progress: bool = True,
    index: PictureIndex | None = None,
) -> tuple[Picture, ...]:
    """Every picture of every subset, in a fixed order (dataset, resolution, subset, file name).

    Only the headers are read, and whether the files are whole; damage in the middle of a file is found when it is
    trained. skip_broken: pictures are read whole, and the broken ones left out with a warning. index: remembers what
    the headers say, so that unchanged pictures are not opened at the next start.
    DataError: pictures are unreadable (all of them in one message); a mask is of another shape; what `find_sources`
    says. SettingError: see `bucket_sizes`.
    """
    at_sizes = [(index, each, size) for index, each in enumerate(datasets) for size in each.sizes]
    buckets = [bucket_sizes(replace(dataset, resolution=size)) for _, dataset, size in at_sizes]
    readable = _read_headers(find_sources(datasets), skip_broken, show_progress, index)
    pictures: list[Picture] = []
    for (index, dataset, size), own_buckets in zip(at_sizes, buckets, strict=True):
        suffix = f"@{size[0]}x{size[1]}" if len(dataset.sizes) > 1 else ""
        choose = cache(partial(choose_bucket, buckets=own_buckets, dataset=replace(dataset, resolution=size)))
        own = [found for found in readable if found[0].dataset == index]
        pictures += balance([_picture(source, own_size, choose(own_size), suffix) for source, own_size in own])
    return tuple(pictures)


def _picture(source: Source, size: tuple[int, int], bucket: tuple[int, int], key_suffix: str) -> Picture:
    tags, nl = source.fields.tags, source.fields.nl
    if tags is None and nl is None:
        tags = source.subset.class_tokens
    return Picture(
        key=source.key + key_suffix,
        path=source.path,
        caption=tags or "",
        nl=nl or "",
        size=size,
        bucket=bucket,
        dataset=source.dataset,
        subset=source.subset,
        mask=source.mask,
    )


def balance(pictures: Sequence[Picture]) -> list[Picture]:
    """Regularisation pictures repeated, or the last of them left out, so that they are used as often as the others.

    As Kohya's scripts do: they are taken in order with their own repeats until there are enough uses; where there are
    too few, each in turn gets one more. Without other pictures nothing changes.
    """
    regular = [picture for picture in pictures if picture.subset.is_reg]
    wanted = sum(picture.repeats for picture in pictures if not picture.subset.is_reg)
    if not regular or not wanted:
        return list(pictures)
    taken: list[Picture] = []
    for picture in regular:
        if wanted > 0:
            taken.append(picture)
            wanted -= picture.repeats
    if unused := [str(picture.path) for picture in regular[len(taken) :]]:
        logger.warning(
            "%d regularisation pictures are more than needed, and are not used:\n%s", len(unused), listed(unused)
        )
    rounds, one_more = divmod(max(0, wanted), len(taken))
    extra = {picture.key: rounds + (number < one_more) for number, picture in enumerate(taken)}
    others = (picture for picture in pictures if not picture.subset.is_reg or picture.key in extra)
    return [replace(picture, extra_repeats=extra.get(picture.key, 0)) for picture in others]


def _read_headers(
    sources: Sequence[Source], skip_broken: bool, show_progress: bool, index: PictureIndex | None
) -> list[tuple[Source, tuple[int, int]]]:
    """The pictures that can be read, with their sizes."""
    paths = dict.fromkeys(path for source in sources for path in _files_to_open(source, skip_broken))
    headers = read_headers(list(paths), skip_broken, show_progress, index)
    found, broken, animated = [], [], []
    for source in sources:
        problem = _problem(source, headers)
        if problem is not None:
            broken.append(problem)
            continue
        header = headers.get(source.path)
        found.append((source, source.size if header is None else header.size))
        if header is not None and header.frames > 1:
            animated.append(str(source.path))
    if broken and not skip_broken:
        advice = "repair or remove them, or set skip_broken_images = true to train without them"
        raise DataError(f"{counted(len(broken), 'picture', 'pictures')} cannot be read: {advice}\n{listed(broken)}")
    if not found:
        raise DataError(f"none of the {len(sources)} pictures can be read:\n{listed(broken)}")
    if broken:
        pictures = counted(len(broken), "picture", "pictures")
        logger.warning("left out %s, which cannot be read:\n%s", pictures, listed(broken))
    if animated:
        logger.warning(
            "%s several frames or pages; the first is trained:\n%s",
            counted(len(animated), "picture has", "pictures have"),
            listed(animated),
        )
    return found


def _files_to_open(source: Source, decode: bool) -> list[Path]:
    """None where a metadata file tells the size, and nothing else needs looking at."""
    if source.size is not None and source.mask is None and not decode:
        return []
    return [source.path] if source.mask is None else [source.path, source.mask]


def _problem(source: Source, headers: Mapping[Path, PictureHeader | str]) -> str | None:
    """Why the picture cannot be trained, if so."""
    for path in (source.path, source.mask):
        if isinstance(headers.get(path), str):
            return headers[path]
    if source.mask is None:
        return None
    (width, height), (mask_width, mask_height) = headers[source.path].size, headers[source.mask].size
    if abs(mask_width * height / (mask_height * width) - 1) <= _MASK_SHAPE:
        return None
    return (
        f"mask {source.mask} is {mask_width}x{mask_height}, of another shape than {source.path}, which is "
        f"{width}x{height}"
    )
