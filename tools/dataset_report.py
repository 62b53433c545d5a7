"""What the pictures and captions of a run are, and what of them would not be trained as it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from library.anima_runtime.text.tokenizer_plans import plan_t5_tokenizer
from library.anima_runtime.text.tokenizers import load_t5_tokenizer
from library.data.dataset import TrainingBatches
from library.data.epochs import plan_epoch
from library.data.faces import warn_of_missing_faces
from library.data.folders import pictures_in, unread_in
from library.data.header_reading import read_headers
from library.data.picture_hashes import hash_pictures
from library.data.picture_index import PictureIndex, picture_index
from library.data.pictures import Picture, scan_datasets
from library.data.summary import describe_data
from library.data.team import ALONE
from library.settings import Settings
from tools.similar_pictures import difference_hashes, groups_of_similar, groups_with_same

# Tokens of a caption beyond which its context is longer than the least, which the model knows best.
LONG_CAPTION = 512
# Shares of a picture's area and factors of its sides that are worth telling.
_MUCH_CUT = 0.1
_ENLARGED = 1.001
# Captions that the tokenizer takes at once.
_CAPTIONS = 1000


@dataclass(frozen=True)
class Bucket:
    """dataset: counted from 0. size: "64x48". uses: pictures with their repeats."""

    dataset: int
    size: str
    pictures: int
    uses: int
    batches: int


@dataclass(frozen=True)
class Fit:
    """How a picture becomes what is trained: its sides times `scale`, then the share `cut` of the area is cropped."""

    path: str
    size: str
    bucket: str
    scale: float
    cut: float


@dataclass(frozen=True)
class DatasetReport:
    """lost: {file: why it is not trained}. cropped: where a tenth or more of the area is cut away. tags: {tag:
    pictures}, most frequent first. long_captions: {file: tokens}, those above 512 in one epoch; None without a
    tokenizer. same_content, similar: groups of files; of those with the same content only the first is in `similar`.
    """

    pictures: int
    uses: int
    buckets: list[Bucket]
    lost: dict[str, str]
    without_caption: list[str]
    enlarged: list[Fit]
    cropped: list[Fit]
    tags: dict[str, int]
    long_captions: dict[str, int] | None
    same_content: list[list[str]]
    similar: list[list[str]]


def report_dataset(settings: Settings, pictures: Sequence[Picture]) -> DatasetReport:
    """Reads every picture once more. DataError: one cannot be read any more."""
    paths = list(dict.fromkeys(picture.path for picture in pictures))
    fits = [_fit(picture) for picture in pictures]
    index = picture_index(settings.data, writes=True) or PictureIndex(writes=False)
    same = groups_with_same(hash_pictures(paths, index, ALONE))
    copies = {path for group in same for path in group[1:]}
    similar = groups_of_similar(difference_hashes(path for path in paths if path not in copies))
    described = describe_data(settings.datasets, pictures)
    tags: Counter[str] = Counter()
    for counts in described["tag_frequency"].values():
        tags.update(counts)
    return DatasetReport(
        pictures=len(paths),
        uses=sum(picture.repeats for picture in pictures),
        buckets=_buckets(settings, pictures),
        lost=dict(_lost(settings, pictures)),
        without_caption=_without_caption(pictures),
        enlarged=sorted((fit for fit in fits if fit.scale > _ENLARGED), key=lambda fit: -fit.scale),
        cropped=sorted((fit for fit in fits if fit.cut >= _MUCH_CUT), key=lambda fit: -fit.cut),
        tags=dict(tags.most_common()),
        long_captions=_long_captions(settings, pictures),
        same_content=[list(map(str, group)) for group in same],
        similar=[list(map(str, group)) for group in similar],
    )


def readable_pictures(settings: Settings) -> tuple[Picture, ...]:
    """The run's pictures without those that are broken, every one read whole. Errors: see `scan_datasets`."""
    pictures = scan_datasets(settings.datasets, skip_broken=True, index=picture_index(settings.data, writes=True))
    warn_of_missing_faces(pictures)
    return pictures


def _buckets(settings: Settings, pictures: Sequence[Picture]) -> list[Bucket]:
    counts: Counter[tuple[int, tuple[int, int]]] = Counter()
    uses: Counter[tuple[int, tuple[int, int]]] = Counter()
    for picture in pictures:
        counts[picture.dataset, picture.bucket] += 1
        uses[picture.dataset, picture.bucket] += picture.repeats
    return [
        Bucket(dataset, _text(size), count, uses[dataset, size], math.ceil(uses[dataset, size] / batch_size))
        for (dataset, size), count in sorted(counts.items())
        for batch_size in [settings.datasets[dataset].batch_size]
    ]


def _fit(picture: Picture) -> Fit:
    (width, height), (bucket_width, bucket_height) = picture.size, picture.bucket
    scale = max(bucket_width / width, bucket_height / height)
    cut = 1 - bucket_width * bucket_height / (width * height * scale**2)
    return Fit(str(picture.path), _text(picture.size), _text(picture.bucket), round(scale, 4), round(cut, 4))


def _lost(settings: Settings, pictures: Sequence[Picture]) -> Iterator[tuple[str, str]]:
    """Files beside the trained ones, and why they are not."""
    trained = {picture.path for picture in pictures}
    subsets = [subset for dataset in settings.datasets for subset in dataset.subsets]
    regular = {subset.image_dir for subset in subsets if subset.is_reg}
    named = (subset.image_dir for subset in subsets if subset.image_dir is not None)
    folders = list(dict.fromkeys([*named, *(path.parent for path in trained)]))
    others = [path for folder in folders for path in pictures_in(folder) if path not in trained]
    headers = read_headers(others, decode=True, show_progress=False)
    for path in others:
        if isinstance(headers[path], str):
            yield str(path), headers[path]
        elif path.parent in regular:
            yield str(path), "more regularisation pictures than are used"
        else:
            yield str(path), "its metadata file does not name it"
    for folder in folders:
        for path in unread_in(folder):
            yield str(path), "a kind of file that is not read: save it as .png"


def _without_caption(pictures: Sequence[Picture]) -> list[str]:
    return list(dict.fromkeys(str(picture.path) for picture in pictures if not (picture.caption or picture.nl)))


def _long_captions(settings: Settings, pictures: Sequence[Picture]) -> dict[str, int] | None:
    """{file: tokens of its longest caption in the first epoch}, most first."""
    folder = plan_t5_tokenizer(settings.model.t5_tokenizer_dir, settings.tokenizers).folder
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = load_t5_tokenizer(folder)
    batch_sizes, seed = [dataset.batch_size for dataset in settings.datasets], settings.run.seed
    plan = plan_epoch(pictures, batch_sizes, seed, 0, 1, 1)
    items = [item for step in plan for batch in step.batches_of_rank[0] for item in batch.items]
    captions = TrainingBatches(pictures, batch_sizes, seed).captions(0)
    longest: Counter[str] = Counter()
    for item, length in zip(items, _lengths(tokenizer, captions), strict=True):
        path = str(pictures[item.picture].path)
        longest[path] = max(longest[path], length)
    return {path: length for path, length in longest.most_common() if length > LONG_CAPTION}


def _lengths(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> Iterator[int]:
    """Tokens of each caption, with the one that ends it."""
    for start in range(0, len(captions), _CAPTIONS):
        yield from map(len, tokenizer(list(captions[start : start + _CAPTIONS])).input_ids)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
