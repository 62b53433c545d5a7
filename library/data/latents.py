"""Latents of every picture, encoded once before training and kept in memory."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from library.console import progress_bar
from library.data.pictures import Picture
from library.data.pixels import load_pixels


@dataclass(frozen=True)
class _View:
    """A picture as it is or mirrored."""

    picture: Picture
    flipped: bool


# (picture key, flipped) -> latents_CTHW, fp32 on the CPU: 1 MiB for a picture of 1024x1024.
LatentCache = dict[tuple[str, bool], torch.Tensor]


def cache_latents(
    pictures: Sequence[Picture],
    encode: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
    show_progress: bool = True,
) -> LatentCache:
    """Encodes every picture, and its mirror image where its subset has flip_aug.

    encode: pixels_BCHW in [-1, 1], fp32 on the CPU -> latents_BCTHW on any device.
    batch_size: pictures, all of one bucket, that are encoded at once; the next batches are loaded meanwhile.
    """
    batches = _batches(pictures, batch_size)
    cache = {}
    with progress_bar(sum(map(len, batches)), "caching latents", shown=show_progress) as bar:
        for views, pixels_BCHW in _loaded(batches):
            latents_BCTHW = encode(pixels_BCHW).detach().to("cpu", torch.float32)
            for view, latents_CTHW in zip(views, latents_BCTHW, strict=True):
                cache[view.picture.key, view.flipped] = latents_CTHW
            bar.update(len(views))
    return cache


def _batches(pictures: Sequence[Picture], batch_size: int) -> list[list[_View]]:
    by_bucket = defaultdict(list)
    for picture in pictures:
        by_bucket[picture.bucket].append(_View(picture, flipped=False))
        if picture.subset.flip_aug:
            by_bucket[picture.bucket].append(_View(picture, flipped=True))
    return [
        views[start : start + batch_size] for views in by_bucket.values() for start in range(0, len(views), batch_size)
    ]


def _loaded(batches: Sequence[list[_View]]) -> Iterator[tuple[list[_View], torch.Tensor]]:
    """Each batch with its pixels_BCHW, in order; threads load two batches ahead, so memory stays bounded."""
    with ThreadPoolExecutor() as pool:
        ahead = deque()
        for views in batches:
            ahead.append((views, [pool.submit(_pixels, view) for view in views]))
            if len(ahead) > 2:
                yield _finished(*ahead.popleft())
        while ahead:
            yield _finished(*ahead.popleft())


def _finished(views: list[_View], loading: Sequence[Future[torch.Tensor]]) -> tuple[list[_View], torch.Tensor]:
    return views, torch.stack([pixels.result() for pixels in loading])


def _pixels(view: _View) -> torch.Tensor:
    return load_pixels(view.picture.path, view.picture.bucket, view.flipped)
