"""Batches for training: the epoch's plan, loaded in order by threads or processes while training goes on."""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from library.data.augment import Variant, draw_variant, load_variant
from library.data.captions import Use, final_caption
from library.data.epochs import BatchPlan, Item, StepPlan, plan_epoch
from library.data.latents import LatentCache
from library.data.masks import is_masked, load_loss_weights
from library.data.pictures import Picture
from library.errors import DataError

logger = logging.getLogger(__name__)

# What is loaded beside training, for each process: 48 MiB a batch of 4 pictures of 1024x1024.
_BATCHES_AHEAD = 4
# Captions announced at once: enough for the text encoder to work in full batches, and to visit the GPU rarely.
_CAPTIONS_AHEAD = 512
# A loading process is looked after every so many seconds; one that finds no room in /dev/shm hangs without a word.
_LOOK_SECONDS, _MOST_WAITS = 5, 60
_WITHOUT_PROCESSES = (
    "lower max_data_loader_n_workers; with 0, threads load instead, which need no /dev/shm and little memory"
)


class _Entry(NamedTuple):
    """A planned batch, and the optimizer step of the run, from 0, that it belongs to."""

    epoch: int
    step: int
    plan: BatchPlan


@dataclass(frozen=True)
class Batch:
    """Pictures of one bucket with their captions; either pixels or latents are set, on the CPU in fp32.

    pixels_BCHW: in [-1, 1]. latents_BCTHW: as the encoder gave them to the cache.
    keys: (epoch, picture key, repeat) of each sample, from which its noise and timestep are derived.
    bucket: (width, height) in pixels. counted: False if its loss must not count (see `BatchPlan`).
    loss_weights: what each sample's loss is multiplied by, float32 [B].
    timestep_offsets: by how many thousandths each sample's timestep is moved.
    loss_mask_B1HW: what the loss of each latent is multiplied by, float32, on their grid; see `library.data.masks`.
        None where no picture of the run is masked.
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
    loss_mask_B1HW: torch.Tensor | None = None


@dataclass(frozen=True)
class StepBatches:
    """One optimizer step's batches for this rank, and how many samples count in it over all ranks."""

    batches: list[Batch]
    sample_count: int


class TrainingBatches:
    """Loads epochs step by step; what an epoch holds depends only on (seed, epoch), not on workers or earlier epochs.

    batch_sizes: one per dataset. filled: the datasets whose last batches are filled, see `plan_epoch`. latents: the
    cache, if pictures are not to be loaded again. workers: loading processes; without them, and for cached latents,
    threads load ahead of training. persistent_workers keeps the processes between epochs. total_steps: the run's
    length, without which token_warmup_step holds no tags back. announce: called now and then with the captions of the
    next steps, before those come; each is announced once.
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
        total_steps: int | None = None,
        announce: Callable[[list[str]], None] | None = None,
        filled: Collection[int] = (),
    ) -> None:
        self._pictures = pictures
        self._batch_sizes = batch_sizes
        self._seed = seed
        self._accumulation = accumulation
        self._rank = rank
        self._world_size = world_size
        self._filled = filled
        self._announce = announce
        self._total_steps = total_steps
        # (epoch, step in it) up to which captions have been announced.
        self._announced = (0, 0)
        self._dataset = _BatchDataset(pictures, seed, latents, total_steps)
        self._sampler = _PlanSampler()
        if workers and latents is not None:
            logger.info("latents are cached, so no loading processes are started (max_data_loader_n_workers)")
            workers = 0
        self._loader = None
        if workers:
            self._loader = DataLoader(
                self._dataset,
                batch_size=None,  # the sampler's entries are whole batches
                sampler=self._sampler,
                num_workers=workers,
                timeout=_LOOK_SECONDS,
                persistent_workers=persistent_workers,
                worker_init_fn=_leave_signals_to_the_main_process,
                generator=torch.Generator(),  # or the loader would draw from the global one
            )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepBatches]:
        """The epoch's steps from `first_step` on; skipped steps are not loaded."""
        plan = self._plan(epoch)
        all_own = self._own_entries(epoch, plan)
        steps, own = plan[first_step:], all_own[first_step:]
        self._sampler.entries = [entry for entries in own for entry in entries]
        if self._loader is None:
            loaded = _loaded_ahead(self._dataset, self._sampler.entries)
        else:
            loaded = _loaded_by_processes(self._loader)
        for number, (step, entries) in enumerate(zip(steps, own, strict=True), first_step):
            if self._announce is not None and (epoch, number) >= self._announced:
                self._announced = self._announce_from(epoch, number, all_own)
            yield StepBatches([next(loaded) for _ in entries], step.sample_count)

    def captions(self, epoch: int) -> list[str]:
        """All captions that this rank meets in an epoch, in order."""
        entries = [entry for entries in self._own_entries(epoch, self._plan(epoch)) for entry in entries]
        return [caption for entry in entries for caption in self._dataset.captions(entry)]

    def _plan(self, epoch: int) -> list[StepPlan]:
        return plan_epoch(
            self._pictures, self._batch_sizes, self._seed, epoch, self._accumulation, self._world_size, self._filled
        )

    def _own_entries(self, epoch: int, plan: Sequence[StepPlan]) -> list[list[_Entry]]:
        """This rank's batches of each step."""
        return [
            [_Entry(epoch, epoch * len(plan) + number, batch) for batch in step.batches_of_rank[self._rank]]
            for number, step in enumerate(plan)
        ]

    def _announce_from(self, epoch: int, number: int, steps: Sequence[Sequence[_Entry]]) -> tuple[int, int]:
        """Announces captions from a step of this epoch's on, and returns the epoch and step to go on from.

        Of short epochs several at once, as far as the run goes: else an encoder would visit the GPU for a few captions
        in each.
        """
        end = self._total_steps or (epoch + 1) * len(steps)
        captions = []
        while len(captions) < _CAPTIONS_AHEAD and epoch * len(steps) + number < end:
            if number == len(steps):
                if len(steps) > _CAPTIONS_AHEAD:  # planned again when it begins, which takes longer for a long one
                    break
                epoch, number = epoch + 1, 0
                steps = self._own_entries(epoch, self._plan(epoch))
            captions += [caption for entry in steps[number] for caption in self._dataset.captions(entry)]
            number += 1
        self._announce(captions)
        return epoch, number


class MeasuredBatches:
    """The same batches each time it is gone through, for pictures of which nothing is drawn at random.

    Their keys say epoch -1, which no training has, so that no training's noise follows from them.
    """

    def __init__(self, pictures: Sequence[Picture], plans: Sequence[BatchPlan], latents: LatentCache | None) -> None:
        self._dataset = _BatchDataset(pictures, seed=0, latents=latents)
        self._entries = [_Entry(-1, 0, plan) for plan in plans]

    def __iter__(self) -> Iterator[Batch]:
        return _loaded_ahead(self._dataset, self._entries)

    def captions(self) -> list[str]:
        """The captions of all batches, without loading these."""
        return [caption for entry in self._entries for caption in self._dataset.captions(entry)]


def _loaded_ahead(dataset: _BatchDataset, entries: Sequence[_Entry]) -> Iterator[Batch]:
    """The batches in order; while one is trained, threads load the next. Decoding and reading leave Python's lock."""
    pool = ThreadPoolExecutor(_BATCHES_AHEAD)
    try:
        waiting: deque[Future[Batch]] = deque()
        for entry in entries:
            waiting.append(pool.submit(dataset.__getitem__, entry))
            if len(waiting) > _BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _loaded_by_processes(loader: DataLoader) -> Iterator[Batch]:
    """The loader's batches. DataError where a process cannot be started, has died, or delivers nothing for minutes."""
    try:
        batches = iter(loader)
    except OSError as error:
        raise DataError(f"processes that load pictures cannot be started ({error}): {_WITHOUT_PROCESSES}") from error
    if hasattr(signal, "SIGCHLD"):
        # PyTorch's handler would raise in the midst of a step; without it the death is found here, between two.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    waits = 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            waits += 1
            if "DataLoader timed out" in str(error) and waits < _MOST_WAITS:
                continue
            if "DataLoader" not in str(error):
                raise
            raise DataError(
                "a process that loads pictures has died or hangs, mostly as memory or /dev/shm is full: "
                + _WITHOUT_PROCESSES
            ) from error
        waits = 0
        yield batch


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A terminal's reach all of its processes; the run still needs its loaders to finish the step it saves after."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _PlanSampler(Sampler[_Entry]):
    """Hands out the entries it was last given: persistent workers live on while the epoch's plan is replaced."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []

    def __iter__(self) -> Iterator[_Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class _BatchDataset(Dataset[Batch]):
    """A planned batch -> the loaded one."""

    def __init__(
        self, pictures: Sequence[Picture], seed: int, latents: LatentCache | None, total_steps: int | None = None
    ) -> None:
        self._pictures = pictures
        self._seed = seed
        self._latents = latents
        self._total_steps = total_steps
        self._is_masked = any(map(is_masked, pictures))

    def __getitem__(self, entry: _Entry) -> Batch:
        epoch, _, plan = entry
        pictures = [self._pictures[item.picture] for item in plan.items]
        variants = [
            draw_variant(picture, self._seed, epoch, item.repeat)
            for picture, item in zip(pictures, plan.items, strict=True)
        ]
        images = torch.stack(list(map(self._image, pictures, variants)))
        return Batch(
            pixels_BCHW=images if self._latents is None else None,
            latents_BCTHW=images if self._latents is not None else None,
            captions=self.captions(entry),
            keys=[(epoch, picture.key, item.repeat) for picture, item in zip(pictures, plan.items, strict=True)],
            paths=[picture.path for picture in pictures],
            bucket=pictures[0].bucket,
            counted=plan.counted,
            loss_weights=torch.tensor([_prior_weight(picture) for picture in pictures]),
            timestep_offsets=[picture.subset.timestep_offset for picture in pictures],
            loss_mask_B1HW=torch.stack(list(map(load_loss_weights, pictures, variants))) if self._is_masked else None,
        )

    def _image(self, picture: Picture, variant: Variant) -> torch.Tensor:
        """pixels_CHW, or the cached latents_CTHW."""
        if self._latents is not None:
            return self._latents[picture.key, variant.flipped]
        return load_variant(picture, variant)

    def captions(self, entry: _Entry) -> list[str]:
        """The batch's captions, without loading it."""
        return [self._caption(item, entry) for item in entry.plan.items]

    def _caption(self, item: Item, entry: _Entry) -> str:
        picture = self._pictures[item.picture]
        use = Use(self._seed, entry.epoch, picture.key, item.repeat, entry.step, self._total_steps)
        return final_caption(picture.caption, picture.nl, picture.subset, use)


def _prior_weight(picture: Picture) -> float:
    return picture.subset.prior_loss_weight if picture.subset.is_reg else 1.0
