"""Which pictures are kept from training to measure the validation loss, and in which form they are measured."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from library.data.epochs import BatchPlan, Item
from library.data.pictures import Picture
from library.data.settings import DatasetSettings
from library.data.sources import listed
from library.errors import DataError
from library.randomness import derive_seed

logger = logging.getLogger(__name__)


def split_validation(
    pictures: Sequence[Picture], datasets: Sequence[DatasetSettings], seed: int
) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """(to train, to validate): of each subset the share that its dataset's validation_split says, and what it takes.

    A share of 1 takes all; one below takes at least one picture and never all, so none of subsets with one picture.
    Regularisation pictures are always trained. A picture trained at several sizes goes whole to one side. The choice
    follows from (validation_seed, else seed; picture), so adding pictures moves few others.
    DataError: nothing is left to train.
    """
    taken: set[tuple[int, int, Path]] = set()
    files_of: dict[tuple[int, int], set[Path]] = defaultdict(set)
    for picture in pictures:
        files_of[picture.dataset, id(picture.subset)].add(picture.path)
    for index, dataset in enumerate(datasets):
        if dataset.validation_split == 0:
            continue
        own_seed = seed if dataset.validation_seed is None else dataset.validation_seed
        for subset in dataset.subsets:
            if subset.is_reg:
                continue
            files = files_of[index, id(subset)]
            drawn = sorted(files, key=lambda path: (derive_seed(own_seed, "validation", path.name), path))
            count = len(files)
            if dataset.validation_split < 1:
                count = max(0, min(max(1, round(len(files) * dataset.validation_split)), len(files) - 1))
            taken.update((index, id(subset), path) for path in drawn[:count])
    kept = tuple(picture for picture in pictures if _file(picture) not in taken)
    validating = tuple(picture for picture in pictures if _file(picture) in taken)
    if validating:
        names, all_files = listed(sorted(str(path) for _, _, path in taken)), len(set(map(_file, pictures)))
        logger.info("validation_split keeps %d of %d pictures from training:\n%s", len(taken), all_files, names)
    if all(picture.subset.is_reg for picture in kept):
        raise DataError("validation_split keeps all pictures from training: lower it, or leave it out of a dataset")
    return kept, validating


def counterparts(trained: Sequence[Picture], validating: Sequence[Picture]) -> tuple[Picture, ...]:
    """As many of the trained pictures, to compare with: always the same, and no regularisation pictures."""
    drawn = sorted((picture for picture in trained if not picture.subset.is_reg), key=_order)
    return tuple(drawn[: len(validating)])


def as_measured(picture: Picture) -> Picture:
    """The picture as it is measured: once, with its whole caption in order, and unchanged by chance.

    Where a caption is one of several by caption_mix or wildcards, it is always the same one.
    """
    subset = replace(
        picture.subset, num_repeats=1, shuffle_caption=False, caption_dropout_rate=0.0, caption_tag_dropout_rate=0.0,
        caption_dropout_every_n_epochs=None, shuffle_sentences=False, sentence_dropout_rate=0.0, token_warmup_step=0,
        flip_aug=False, color_aug=False, random_crop=False, face_crop_aug_range=None,
    )  # fmt: skip
    return replace(picture, subset=subset, extra_repeats=0)


def measured_batches(pictures: Sequence[Picture], batch_sizes: Sequence[int], most: int | None) -> list[BatchPlan]:
    """The pictures in batches of one dataset and bucket each, at most so many: always the same ones.

    batch_sizes: one per dataset.
    """
    groups = defaultdict(list)
    for index in sorted(range(len(pictures)), key=lambda index: _order(pictures[index])):
        groups[pictures[index].dataset, pictures[index].bucket].append(Item(index, 0))
    batches = [
        BatchPlan(tuple(items[start : start + batch_sizes[dataset]]))
        for (dataset, _), items in groups.items()
        for start in range(0, len(items), batch_sizes[dataset])
    ]
    return sorted(batches, key=lambda batch: _order(pictures[batch.items[0].picture]))[:most]


def _order(picture: Picture) -> tuple[int, str]:
    """An order that has nothing to do with names, and that more pictures do not change."""
    return derive_seed(0, "measured", picture.key), picture.key


def _file(picture: Picture) -> tuple[int, int, Path]:
    """The same for a picture at all its sizes."""
    return picture.dataset, id(picture.subset), picture.path
