"""The order of an epoch: which uses of which pictures form a batch, and which batches form an optimizer step."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import NamedTuple

from library.data.pictures import Picture
from library.data.settings import DatasetSettings
from library.garbage import uncollected
from library.randomness import python_random


class Item(NamedTuple):
    """One use of a picture: its place in the list of pictures, and which of its repeats (from 0).

    Where batches are filled, repeats beyond the picture's own are further uses.
    """

    picture: int
    repeat: int


@dataclass(frozen=True)
class BatchPlan:
    """Uses of pictures that share a dataset and a bucket.

    counted: False for a copy that only keeps a rank busy; its loss must not count.
    """

    items: tuple[Item, ...]
    counted: bool = True


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: batches_of_rank[rank] are that rank's batches, equally many for every rank.

    sample_count: samples that count, over all ranks; the step's loss is the sum over them divided by it.
    """

    batches_of_rank: tuple[tuple[BatchPlan, ...], ...]
    sample_count: int


@dataclass(frozen=True)
class LargestBatch:
    """The largest batch that a bucket, (width, height) in pixels, ever makes.

    pictures: enough of the bucket's for one such batch. uses: those of all its pictures in an epoch, with those that
    fill the last batch.
    """

    bucket: tuple[int, int]
    size: int
    pictures: tuple[Picture, ...]
    uses: int

    @property
    def pixels(self) -> int:
        """Of the whole batch."""
        return self.size * self.bucket[0] * self.bucket[1]


def filled_datasets(datasets: Sequence[DatasetSettings]) -> set[int]:
    """Those, counted from 0, whose buckets' last batches are filled."""
    return {number for number, dataset in enumerate(datasets) if dataset.fill_last_batches}


@uncollected()
def plan_epoch(
    pictures: Sequence[Picture],
    batch_sizes: Sequence[int],
    seed: int,
    epoch: int,
    accumulation: int,
    world_size: int,
    filled: Collection[int] = (),
) -> list[StepPlan]:
    """The steps of an epoch, which use each (picture, repeat) exactly once, in an order drawn from (seed, epoch).

    batch_sizes: one per dataset. A bucket's last batch is smaller if need be; in the datasets numbered in `filled`,
    further repeats make it whole. A step takes accumulation * world_size batches; the epoch's last step what is left.
    """
    random = python_random(seed, "order", epoch)
    batches = []
    for (dataset, bucket), items in sorted(_items_by_bucket(pictures).items()):
        random.shuffle(items)
        size = batch_sizes[dataset]
        if dataset in filled:
            items += _more_uses(items, size, pictures, python_random(seed, "filling", epoch, dataset, *bucket))
        batches += [BatchPlan(tuple(items[start : start + size])) for start in range(0, len(items), size)]
    random.shuffle(batches)
    per_step = accumulation * world_size
    return [_step(batches[start : start + per_step], world_size) for start in range(0, len(batches), per_step)]


def steps_per_epoch(pictures: Sequence[Picture], batch_sizes: Sequence[int], accumulation: int, world_size: int) -> int:
    """How many optimizer steps each epoch has."""
    batches = sum(
        math.ceil(len(items) / batch_sizes[dataset]) for (dataset, _), items in _items_by_bucket(pictures).items()
    )
    return math.ceil(batches / (accumulation * world_size))


def largest_batches(
    pictures: Sequence[Picture], batch_sizes: Sequence[int], filled: Collection[int] = ()
) -> list[LargestBatch]:
    """The largest batch of each dataset's each bucket, those of the fewest pixels first."""
    found = []
    for (dataset, bucket), items in _items_by_bucket(pictures).items():
        size = batch_sizes[dataset] if dataset in filled else min(batch_sizes[dataset], len(items))
        enough = dict.fromkeys(item.picture for item in items[:size])
        uses = len(items) + (_missing(len(items), size) if dataset in filled else 0)
        found.append(LargestBatch(bucket, size, tuple(pictures[index] for index in enough), uses))
    return sorted(found, key=lambda batch: (batch.pixels, batch.bucket))


def bucket_table(pictures: Sequence[Picture], batch_sizes: Sequence[int], filled: Collection[int] = ()) -> str:
    """A table to show at the start: each bucket's pictures, their uses in an epoch, and the batches these make.

    Where batches are filled, also how many uses that takes.
    """
    lines = [f"{'dataset':>7}  {'bucket':>11}  {'pictures':>8}  {'with repeats':>12}  {'batches':>7}"]
    if filled:
        lines[0] += f"  {'filled by':>9}"
    for (dataset, (width, height)), items in sorted(_items_by_bucket(pictures).items()):
        distinct = len({item.picture for item in items})
        batches = math.ceil(len(items) / batch_sizes[dataset])
        lines.append(f"{dataset:>7}  {f'{width}x{height}':>11}  {distinct:>8}  {len(items):>12}  {batches:>7}")
        if filled:
            lines[-1] += f"  {_missing(len(items), batch_sizes[dataset]) if dataset in filled else 0:>9}"
    return "\n".join(lines)


def _items_by_bucket(pictures: Iterable[Picture]) -> dict[tuple[int, tuple[int, int]], list[Item]]:
    """(dataset, bucket) -> every use of its pictures."""
    groups = defaultdict(list)
    for index, picture in enumerate(pictures):
        groups[picture.dataset, picture.bucket] += [Item(index, repeat) for repeat in range(picture.repeats)]
    return groups


def _missing(uses: int, size: int) -> int:
    """How many the last batch lacks."""
    return -uses % size


def _more_uses(items: Sequence[Item], size: int, pictures: Sequence[Picture], random: Random) -> list[Item]:
    """What the last batch of a bucket lacks, as further repeats of its pictures: their noise and captions are new.

    items: the bucket's uses in order. Those of other batches are drawn first, so that few pictures meet themselves.
    """
    missing, full = _missing(len(items), size), len(items) // size * size
    lenders = random.sample(items[:full], full) + random.sample(items[full:], len(items) - full)
    lent: Counter[int] = Counter()
    found = []
    for picture, _ in islice(cycle(lenders), missing):
        found.append(Item(picture, pictures[picture].repeats + lent[picture]))
        lent[picture] += 1
    return found


def _step(batches: Sequence[BatchPlan], world_size: int) -> StepPlan:
    """Deals the batches to the ranks in turn; ranks left without one get a copy of the first that does not count.

    So all ranks run equally many backward passes, which gradient synchronisation needs.
    """
    copies = [BatchPlan(batches[0].items, counted=False)] * (-len(batches) % world_size)
    dealt = [*batches, *copies]
    return StepPlan(
        batches_of_rank=tuple(tuple(dealt[rank::world_size]) for rank in range(world_size)),
        sample_count=sum(len(batch.items) for batch in batches),
    )
