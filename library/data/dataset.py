"""Batches for training: the epoch's plan, loaded in order, with or without loading processes."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from library.data.captions import final_caption
from library.data.epochs import BatchPlan, Item, plan_epoch
from library.data.latents import LatentCache
from library.data.pictures import Picture
from library.data.pixels import load_pixels
from library.randomness import python_random

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Pictures of one bucket with their captions; either pixels or latents are set, on the CPU in fp32.

    pixels_BCHW: in [-1, 1]. latents_BCTHW: as the encoder gave them to the cache.
    keys: (epoch, picture key, repeat) of each sample, from which its noise and timestep are derived.
    bucket: (width, height) in pixels. counted: False if its loss must not count (see `BatchPlan`).
    loss_weights: what each sample's loss is multiplied by, float32 [B].
    timestep_offsets: by how many thousandths each sample's timestep is moved.
    """

    pixels_BCHW: torch.Tensor | None
    latents_BCTHW: torch.Tensor | None
    captions: list[str]
    keys: list[tuple[int, str, int]]
    paths: list[Path]
    bucket: tuple[int, int]
    counted: bool
    loss_weights: torch.Tensor
    timestep_offsets: list[int]


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step's batches for this rank, and how many samples count in it over all ranks."""

    batches: list[Batch]
    sample_count: int


class TrainingBatches:
    """Loads epochs step by step; what an epoch holds depends only on (seed, epoch), not on workers or earlier epochs.

    batch_sizes: one per dataset. latents: the cache, if pictures are not to be loaded again. workers: loading
    processes; none are started for cached latents, which need no loading. persistent_workers keeps them between epochs.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        batch_sizes: Sequence[int],
        seed: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        latents: LatentCache | None = None,
        workers: int = 0,
        persistent_workers: bool = False,
    ) -> None:
        self._pictures = pictures
        self._batch_sizes = batch_sizes
        self._seed = seed
        self._accumulation = accumulation
        self._rank = rank
        self._world_size = world_size
        self._sampler = _PlanSampler()
        if workers and latents is not None:
            logger.info("latents are cached, so no loading processes are started (max_data_loader_n_workers)")
            workers = 0
        self._loader = DataLoader(
            _BatchDataset(pictures, seed, latents),
            batch_size=None,  # the sampler's entries are whole batches
            sampler=self._sampler,
            num_workers=workers,
            persistent_workers=persistent_workers and workers > 0,
            worker_init_fn=_leave_ctrl_c_to_the_main_process,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepBatches]:
        """The epoch's steps from `first_step` on; skipped steps are not loaded."""
        plan = plan_epoch(self._pictures, self._batch_sizes, self._seed, epoch, self._accumulation, self._world_size)
        steps = plan[first_step:]
        self._sampler.entries = [(epoch, batch) for step in steps for batch in step.batches_of_rank[self._rank]]
        loaded = iter(self._loader)
        for step in steps:
            batches = [next(loaded) for _ in step.batches_of_rank[self._rank]]
            yield StepBatches(batches, step.sample_count)


def _leave_ctrl_c_to_the_main_process(worker: int) -> None:
    """Ctrl+C reaches every process of a terminal; the run still needs its loaders to finish the step it saves after."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _PlanSampler(Sampler[tuple[int, BatchPlan]]):
    """Hands out the entries it was last given: persistent workers live on while the epoch's plan is replaced."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, BatchPlan]] = []

    def __iter__(self) -> Iterator[tuple[int, BatchPlan]]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class _BatchDataset(Dataset[Batch]):
    """(epoch, planned batch) -> the loaded batch."""

    def __init__(self, pictures: Sequence[Picture], seed: int, latents: LatentCache | None) -> None:
        self._pictures = pictures
        self._seed = seed
        self._latents = latents

    def __getitem__(self, entry: tuple[int, BatchPlan]) -> Batch:
        epoch, plan = entry
        pictures = [self._pictures[item.picture] for item in plan.items]
        images = torch.stack([self._image(item, epoch) for item in plan.items])
        return Batch(
            pixels_BCHW=images if self._latents is None else None,
            latents_BCTHW=images if self._latents is not None else None,
            captions=[self._caption(item, epoch) for item in plan.items],
            keys=[(epoch, picture.key, item.repeat) for picture, item in zip(pictures, plan.items, strict=True)],
            paths=[picture.path for picture in pictures],
            bucket=pictures[0].bucket,
            counted=plan.counted,
            loss_weights=torch.ones(len(pictures)),
            timestep_offsets=[picture.subset.timestep_offset for picture in pictures],
        )

    def _image(self, item: Item, epoch: int) -> torch.Tensor:
        """pixels_CHW, or the cached latents_CTHW."""
        picture = self._pictures[item.picture]
        random = python_random(self._seed, "flip", epoch, picture.key, item.repeat)
        flipped = picture.subset.flip_aug and random.random() < 0.5
        if self._latents is not None:
            return self._latents[picture.key, flipped]
        return load_pixels(picture.path, picture.bucket, flipped)

    def _caption(self, item: Item, epoch: int) -> str:
        picture = self._pictures[item.picture]
        return final_caption(picture.caption, picture.subset, self._seed, epoch, picture.key, item.repeat)
