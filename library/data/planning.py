"""The pictures of a run, found and divided before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from library.data.faces import warn_of_missing_faces
from library.data.picture_index import picture_index
from library.data.pictures import Picture, scan_datasets
from library.data.settings import DatasetSettings, DataSettings
from library.data.validation import split_validation
from library.errors import Problems

Pictures = tuple[Picture, ...]


def plan_pictures(
    settings: DataSettings, datasets: Sequence[DatasetSettings], seed: int, is_main: bool, problems: Problems
) -> tuple[Pictures, Pictures]:
    """(to train, to validate); both empty where something is wrong with them, which goes to `problems`.

    is_main: whether this process is the one that tells, and writes the index of what it read.
    """
    if not datasets:
        return (), ()
    index = picture_index(settings, is_main)
    pictures = problems.attempt(scan_datasets, datasets, settings.skip_broken_images, is_main, index)
    if not pictures:
        return (), ()
    warn_of_missing_faces(pictures)
    return problems.attempt(split_validation, pictures, datasets, seed) or ((), ())
