"""Latents of every picture, encoded once before training and kept in memory or on disk."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from library.console import progress_bar
from library.data.augment import Variant, load_variant
from library.data.folders import folder_of
from library.data.latent_files import LatentFile, LatentFiles, View, are_there
from library.data.picture_hashes import hash_picture
from library.data.picture_index import cannot_write
from library.data.pictures import Picture
from library.data.team import ALONE, Team
from library.errors import DataError
from library.garbage import uncollected

logger = logging.getLogger(__name__)

# pixels_BCHW in [-1, 1], fp32 on the CPU -> latents_BCTHW on any device
Encode = Callable[[torch.Tensor], torch.Tensor]
# A picture, mirrored or not -> pixels_CHW
Load = Callable[[View], torch.Tensor]

# (picture key, flipped) -> latents_CTHW, fp32 on the CPU: 1 MiB for a picture of 1024x1024.
LatentCache = Mapping[tuple[str, bool], torch.Tensor]

# Pictures that are decoded ahead of the encoder, 12 MiB each at 1024x1024, and batches that wait to be saved.
_PICTURES_AHEAD = 32
_BATCHES_TO_SAVE = 8
# Latents that processes exchange at once, 1 MiB each at 1024x1024.
_EXCHANGED = 64


def cache_latents(
    pictures: Sequence[Picture], encode: Encode, batch_size: int, team: Team = ALONE, show_progress: bool = True
) -> LatentCache:
    """Encodes every picture, and its mirror image where its subset has flip_aug, and keeps all in memory.

    batch_size: pictures, all of one bucket, that are encoded at once. Each process encodes its share and gets the
    others' in exchange.
    """
    _tell_of_foreign_caches(pictures)
    views = _views(pictures)
    own = {}
    with progress_bar(len(team.share(views)), "caching latents", shown=show_progress) as bar:
        for batch, latents_BCTHW in _encoded(team.share(views), _pixels, encode, batch_size):
            own.update(zip([view.key for view in batch], latents_BCTHW, strict=True))
            bar.update(len(batch))
    if team.size == 1:
        return own
    cache, waiting = {}, list(own.items())
    for start in range(0, -(-len(views) // team.size), _EXCHANGED):
        cache.update(team.gather(waiting[start : start + _EXCHANGED]))
    return cache


def cache_latents_to_disk(
    pictures: Sequence[Picture],
    encode: Encode,
    batch_size: int,
    files: LatentFiles,
    skip_check: bool = False,
    team: Team = ALONE,
    show_progress: bool = True,
) -> LatentCache:
    """Like `cache_latents`, but in files, where an earlier run's are found again; each process writes its share.

    skip_check: take files by their names and pictures by their times. In any case a damaged file is found when it is
    read, and encoded anew.
    DataError: a picture cannot be read, or a file cannot be written (a full disk); what was written is kept.
    """
    _tell_of_foreign_caches(pictures)
    with uncollected():
        views = _views(pictures)
        located = list(zip(views, files.locate(views, skip_check, team, show_progress), strict=True))
        file_of = {view.key: file for view, file in located}
        distinct = {(file.cache, file.key): view for view, file in located}  # copies of a picture share a file
        share = team.share(list(distinct.values()))
        there = are_there([file_of[view.key] for view in share], skip_check)
        wanted = [view for view, is_there in zip(share, there, strict=True) if not is_there]
    logger.info("latents on disk: %d of %d found", len(share) - len(wanted), len(share))

    def load(view: View) -> torch.Tensor:
        return _pixels_of(view, file_of[view.key])

    shown, started = show_progress and len(wanted) > 0, time.perf_counter()
    with ThreadPoolExecutor(4) as savers, progress_bar(len(wanted), "caching latents", shown=shown) as bar:
        saving = deque()
        for batch, latents_BCTHW in _encoded(wanted, load, encode, batch_size):
            saving.append(
                [
                    savers.submit(_save, file_of[view.key], latents)
                    for view, latents in zip(batch, latents_BCTHW, strict=True)
                ]
            )
            if len(saving) > _BATCHES_TO_SAVE:
                _finish(saving.popleft())
            bar.update(len(batch))
        while saving:
            _finish(saving.popleft())
    if wanted:
        seconds = time.perf_counter() - started
        logger.info("encoded %d in %.1f s: %.2f pictures a second", len(wanted), seconds, len(wanted) / seconds)
    team.gather([])  # everyone's files are there
    return LatentsOnDisk(located, encode)


class LatentsOnDisk(Mapping[tuple[str, bool], torch.Tensor]):
    """(picture key, flipped) -> latents_CTHW, read from its file each time; a damaged file is replaced."""

    def __init__(self, located: Sequence[tuple[View, LatentFile]], encode: Encode) -> None:
        self._found = {view.key: (view, file) for view, file in located}
        self._encode = encode

    def __getitem__(self, key: tuple[str, bool]) -> torch.Tensor:
        view, file = self._found[key]
        latents_CTHW = file.read()
        if latents_CTHW is None:
            logger.warning("the cached latents of %s are missing or damaged: encoding it again", view.picture.path)
            (latents_CTHW,) = self._encode(_pixels_of(view, file)[None]).detach().to("cpu", torch.float32)
            _save(file, latents_CTHW)
        return latents_CTHW

    def remove_others(self) -> int:
        """Deletes what else is cached for these pictures' folders, and returns how many files that were.

        They belong to pictures that changed or are gone, or to other sizes or VAEs, which another run may need.
        """
        used = defaultdict(set)
        for _, file in self._found.values():
            used[file.cache].add(file.key)
        unused = [(cache, key) for cache, keys in used.items() for key in cache.keys() - keys]
        for cache, key in unused:
            cache.remove(key)
        return len(unused)

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _views(pictures: Sequence[Picture]) -> list[View]:
    return [
        View(picture, flipped)
        for picture in pictures
        for flipped in ((False, True) if picture.subset.flip_aug else (False,))
    ]


def _encoded(
    views: Sequence[View], load: Load, encode: Encode, batch_size: int
) -> Iterator[tuple[list[View], torch.Tensor]]:
    """Each batch with its latents_BCTHW, fp32 on the CPU."""
    by_bucket = defaultdict(list)
    for view in views:
        by_bucket[view.picture.bucket].append(view)
    batches = [
        members[start : start + batch_size]
        for members in by_bucket.values()
        for start in range(0, len(members), batch_size)
    ]
    for batch, pixels_BCHW in _loaded(batches, load, ahead=max(2, _PICTURES_AHEAD // batch_size)):
        yield batch, encode(pixels_BCHW).detach().to("cpu", torch.float32)


def _loaded(batches: Sequence[list[View]], load: Load, ahead: int) -> Iterator[tuple[list[View], torch.Tensor]]:
    """Each batch with its pixels_BCHW, in order; threads load `ahead` batches ahead, so memory stays bounded."""
    pool = ThreadPoolExecutor()
    try:
        waiting = deque()
        for views in batches:
            waiting.append((views, [pool.submit(load, view) for view in views]))
            if len(waiting) > ahead:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(views: list[View], loading: Sequence[Future[torch.Tensor]]) -> tuple[list[View], torch.Tensor]:
    return views, torch.stack([pixels.result() for pixels in loading])


def _pixels(view: View) -> torch.Tensor:
    return load_variant(view.picture, Variant(view.flipped))


def _pixels_of(view: View, file: LatentFile) -> torch.Tensor:
    """The pixels that belong into the file. DataError: the picture has changed since the file was named for it."""
    pixels_CHW = _pixels(view)
    if hash_picture(view.picture.path) != file.content:
        raise DataError(f"picture {view.picture.path} has changed since this run began: start it again")
    return pixels_CHW


def _save(file: LatentFile, latents_CTHW: torch.Tensor) -> None:
    try:
        file.write(latents_CTHW)
    except OSError as error:
        raise cannot_write(file.cache.folder, error) from error


def _finish(saving: Sequence[Future[None]]) -> None:
    for saved in saving:
        saved.result()


def _tell_of_foreign_caches(pictures: Sequence[Picture]) -> None:
    """Kohya's scripts leave .npz files beside the pictures; those say too little of how they were made to be used."""
    folders = map(Path, dict.fromkeys(folder_of(picture.path) for picture in pictures))
    having = [folder for folder in folders if next(folder.glob("*.npz"), None) is not None]
    if having:
        logger.info("%s: latents cached by other trainers (.npz) lie here; they are not used", having[0])
