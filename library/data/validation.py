"""Which pictures are kept from training to measure the validation loss."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from library.data.pictures import Picture
from library.data.settings import DatasetSettings
from library.data.sources import listed
from library.randomness import derive_seed

logger = logging.getLogger(__name__)


def split_validation(
    pictures: Sequence[Picture], datasets: Sequence[DatasetSettings], seed: int
) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """(to train, to validate): of each subset the share that its dataset's validation_split says, and what it takes.

    At least one picture and never all; none of subsets with one picture and of regularisation pictures. A picture
    trained at several sizes goes whole to one side. The choice follows from (validation_seed, else seed; picture), so
    adding pictures moves few others.
    """
    taken: set[tuple[int, int, Path]] = set()
    for index, dataset in enumerate(datasets):
        if dataset.validation_split == 0:
            continue
        own_seed = seed if dataset.validation_seed is None else dataset.validation_seed
        for subset in dataset.subsets:
            if subset.is_reg:
                continue
            files = {picture.path for picture in pictures if picture.dataset == index and picture.subset is subset}
            drawn = sorted(files, key=lambda path: (derive_seed(own_seed, "validation", path.name), path))
            count = min(max(1, round(len(files) * dataset.validation_split)), len(files) - 1)
            taken.update((index, id(subset), path) for path in drawn[: max(0, count)])
    kept = tuple(picture for picture in pictures if _file(picture) not in taken)
    validating = tuple(picture for picture in pictures if _file(picture) in taken)
    if validating:
        names, all_files = listed(sorted(str(path) for _, _, path in taken)), len(set(map(_file, pictures)))
        logger.info("validation_split keeps %d of %d pictures from training:\n%s", len(taken), all_files, names)
    return kept, validating


def _file(picture: Picture) -> tuple[int, int, Path]:
    """The same for a picture at all its sizes."""
    return picture.dataset, id(picture.subset), picture.path
