"""What the pictures of a run are, for an adapter's metadata, in the shapes that readers of Kohya's files know."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import Any

from library.data.pictures import Picture
from library.data.settings import DatasetSettings, SubsetSettings
from library.options import options_of

# A safetensors header over 100 MB cannot be read back, and whole captions do not belong into a shared file: the most
# frequent tags are kept, and of natural-language captions only parts as short as a tag.
_MOST_TAGS = 10_000
_LONGEST_TAG = 200

_SHARED_BY_DATASETS = (
    "batch_size_per_device",
    "enable_bucket",
    "bucket_no_upscale",
    "min_bucket_reso",
    "max_bucket_reso",
)
_SHARED_BY_SUBSETS = ("flip_aug", "shuffle_caption", "keep_tokens", "caption_dropout_rate", "caption_tag_dropout_rate")


@dataclass(frozen=True)
class _Folder:
    """A subset under a name of its own: "10_cat", then "10_cat (2)" for another folder, or dataset, of that name."""

    name: str
    subset: SubsetSettings
    pictures: Sequence[Picture]

    @property
    def files(self) -> Sequence[Picture]:
        """Each picture once, also where it is trained at several sizes."""
        return list({picture.path: picture for picture in self.pictures}.values())


def describe_data(datasets: Sequence[DatasetSettings], pictures: Sequence[Picture]) -> dict[str, Any]:
    """JSON-ready values of Kohya's metadata keys without their "ss_"; of paths only the last name.

    resolution: (width, height) of the dataset with the largest area. Settings that all datasets or subsets share stand
    beside it; `datasets` tells each one's own.
    """
    folders = _folders(datasets, pictures)
    every = [folder for own in folders for folder in own]
    tags = {folder.name: _tag_counts(folder) for folder in every}
    return {
        **_image_counts(pictures),
        "resolution": max((size for dataset in datasets for size in dataset.sizes), key=lambda size: size[0] * size[1]),
        "datasets": [_describe_dataset(dataset, own, tags) for dataset, own in zip(datasets, folders, strict=True)],
        "dataset_dirs": _directories(folder for folder in every if not folder.subset.is_reg),
        "reg_dataset_dirs": _directories(folder for folder in every if folder.subset.is_reg),
        "tag_frequency": _tag_frequency(tags),
        "bucket_info": _bucket_info(pictures),
        **_shared([_dataset_values(dataset) for dataset in datasets], _SHARED_BY_DATASETS),
        **_shared([_subset_values(folder.subset) for folder in every], _SHARED_BY_SUBSETS),
    }


def _image_counts(pictures: Iterable[Picture]) -> dict[str, int]:
    """Uses in an epoch, those of regularisation pictures apart."""
    counts = Counter({False: 0, True: 0})
    for picture in pictures:
        counts[picture.subset.is_reg] += picture.repeats
    return {"num_train_images": counts[False], "num_reg_images": counts[True]}


def _directories(folders: Iterable[_Folder]) -> dict[str, dict[str, int]]:
    return {folder.name: {"n_repeats": folder.subset.num_repeats, "img_count": len(folder.files)} for folder in folders}


def _folders(datasets: Sequence[DatasetSettings], pictures: Sequence[Picture]) -> list[list[_Folder]]:
    """The folders of each dataset, with their pictures."""
    of_subset: dict[tuple[int, int], list[Picture]] = defaultdict(list)
    for picture in pictures:
        of_subset[picture.dataset, id(picture.subset)].append(picture)
    seen: Counter[str] = Counter()

    def folder(dataset: int, subset: SubsetSettings) -> _Folder:
        name = (subset.image_dir or subset.metadata_file).resolve().name
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name} ({seen[name]})"
        return _Folder(unique, subset, of_subset[dataset, id(subset)])

    return [[folder(index, subset) for subset in dataset.subsets] for index, dataset in enumerate(datasets)]


def _describe_dataset(
    dataset: DatasetSettings, folders: Sequence[_Folder], tags: Mapping[str, Counter[str]]
) -> dict[str, Any]:
    """tags: those of each folder by its name, as `_tag_counts` gives them."""
    pictures = [picture for folder in folders for picture in folder.pictures]
    return {
        **_dataset_values(dataset),
        **_image_counts(pictures),
        "tag_frequency": _tag_frequency({folder.name: tags[folder.name] for folder in folders}),
        "bucket_info": _bucket_info(pictures),
        "subsets": [{**_subset_values(folder.subset), "img_count": len(folder.files)} for folder in folders],
    }


def _dataset_values(dataset: DatasetSettings) -> dict[str, Any]:
    values = {option.name: getattr(dataset, option.name) for option in options_of(DatasetSettings)}
    values["batch_size_per_device"] = values.pop("batch_size")
    return values


def _subset_values(subset: SubsetSettings) -> dict[str, Any]:
    values = {option.name: getattr(subset, option.name) for option in options_of(SubsetSettings)}
    return {name: value.resolve().name if isinstance(value, Path) else value for name, value in values.items()}


def _tag_counts(folder: _Folder) -> Counter[str]:
    """{tag: the folder's pictures that have it}"""
    counts: Counter[str] = Counter()
    for picture in folder.files:
        counts.update(_tags(picture.caption, folder.subset))
    return counts


def _tag_frequency(tags: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """{folder: {tag: pictures that have it}} of the most frequent tags, these first."""
    counted = ((count, name, tag) for name, counts in tags.items() for tag, count in counts.items())
    frequency: dict[str, dict[str, int]] = defaultdict(dict)
    for count, name, tag in nlargest(_MOST_TAGS, counted, key=itemgetter(0)):
        frequency[name][tag] = count
    return frequency


def _tags(caption: str, subset: SubsetSettings) -> list[str]:
    """A caption's tags, each once, without the marks that only tell which of them stay in place or together."""
    for mark in ("\n", subset.keep_tokens_separator, subset.secondary_separator):
        if mark:
            caption = caption.replace(mark, subset.caption_separator)
    tags = {tag.strip() for tag in caption.split(subset.caption_separator)}
    return sorted(tag for tag in tags if 0 < len(tag) <= _LONGEST_TAG)


def _bucket_info(pictures: Sequence[Picture]) -> dict[str, Any]:
    """Bucket sizes with the pictures an epoch shows of each, and how far pictures are from their buckets' shapes."""
    counts: Counter[tuple[int, int]] = Counter()
    for picture in pictures:
        counts[picture.bucket] += picture.repeats
    errors = [abs(_aspect(picture.size) - _aspect(picture.bucket)) for picture in pictures]
    return {
        "buckets": {
            str(index): {"resolution": bucket, "count": count}
            for index, (bucket, count) in enumerate(sorted(counts.items()))
        },
        "mean_img_ar_error": sum(errors) / len(errors) if errors else 0.0,
    }


def _aspect(size: tuple[int, int]) -> float:
    return size[0] / size[1]


def _shared(described: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """The named values that all of them have."""
    values = {name: {each[name] for each in described} for name in names}
    return {name: value.pop() for name, value in values.items() if len(value) == 1}
