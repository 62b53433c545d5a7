"""An epoch uses every (picture, repeat) exactly once, whatever the buckets, batches, steps and ranks."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.epochs import bucket_table, plan_epoch, steps_per_epoch
from library.data.pictures import Picture
from library.data.settings import SubsetSettings


def picture(index, dataset, bucket, repeats):
    subset = SubsetSettings(num_repeats=repeats)
    return Picture(f"{dataset}/0/{index}", Path(f"{index}.png"), "", bucket, bucket, dataset, subset)


pictures_strategy = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([(64, 64), (64, 128), (128, 64)]), st.integers(1, 4)),
    min_size=1,
    max_size=25,
).map(lambda rows: [picture(index, *row) for index, row in enumerate(rows)])


@settings(max_examples=60, deadline=None)
@given(
    pictures=pictures_strategy,
    batch_sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_use_exactly_once(pictures, batch_sizes, accumulation, world_size, epoch):
    steps = plan_epoch(pictures, batch_sizes, 7, epoch, accumulation, world_size)
    used = Counter()
    for step in steps:
        assert len(step.batches_of_rank) == world_size
        assert len({len(batches) for batches in step.batches_of_rank}) == 1  # as many on every rank
        assert 1 <= len(step.batches_of_rank[0]) <= accumulation
        batches = [batch for rank in step.batches_of_rank for batch in rank]
        real = [batch for batch in batches if batch.counted]
        assert len(batches) - len(real) < world_size
        assert step.sample_count == sum(len(batch.items) for batch in real) > 0
        for batch in batches:
            kinds = {(pictures[item.picture].dataset, pictures[item.picture].bucket) for item in batch.items}
            assert len(kinds) == 1
            assert 1 <= len(batch.items) <= batch_sizes[next(iter(kinds))[0]]
        used.update((item.picture, item.repeat) for batch in real for item in batch.items)
    expected = {(index, repeat) for index, each in enumerate(pictures) for repeat in range(each.repeats)}
    assert used == Counter(expected)
    assert len(steps) == steps_per_epoch(pictures, batch_sizes, accumulation, world_size)


def many(count=40):
    return [picture(index, 0, (64, 64), 1) for index in range(count)]


def test_order_follows_from_seed_and_epoch():
    plan = plan_epoch(many(), [4], 1, 0, 1, 1)
    assert plan == plan_epoch(many(), [4], 1, 0, 1, 1)
    assert plan != plan_epoch(many(), [4], 2, 0, 1, 1)
    assert plan != plan_epoch(many(), [4], 1, 1, 1, 1)


def test_batches_mix_anew_each_epoch():
    def sets(epoch):
        plan = plan_epoch(many(), [4], 1, epoch, 1, 1)
        return {frozenset(item.picture for item in step.batches_of_rank[0][0].items) for step in plan}

    assert len(sets(0) & sets(1)) <= 1


def test_buckets_are_interleaved():
    pictures = [picture(index, 0, (64, 64) if index < 20 else (128, 64), 1) for index in range(40)]
    steps = plan_epoch(pictures, [2], 1, 0, 1, 1)
    buckets = [pictures[step.batches_of_rank[0][0].items[0].picture].bucket for step in steps]
    changes = sum(one != following for one, following in pairwise(buckets))
    assert changes >= 5  # of 19 neighbours, about 10 differ in a random order, and 1 in a sorted one


def test_last_batch_is_smaller_and_last_step_shorter():
    steps = plan_epoch(many(9), [2], 1, 0, accumulation=2, world_size=1)  # 5 batches: 2 + 2 + 1 per step
    assert [len(step.batches_of_rank[0]) for step in steps] == [2, 2, 1]
    assert sum(step.sample_count for step in steps) == 9
    sizes = sorted(len(batch.items) for step in steps for batch in step.batches_of_rank[0])
    assert sizes == [1, 2, 2, 2, 2]


def test_ranks_without_a_batch_get_a_copy_that_does_not_count():
    (step,) = plan_epoch(many(3), [1], 1, 0, accumulation=1, world_size=4)
    batches = [rank[0] for rank in step.batches_of_rank]
    assert [batch.counted for batch in batches] == [True, True, True, False]
    assert batches[3].items == batches[0].items
    assert step.sample_count == 3


def test_the_same_samples_form_a_step_on_any_number_of_gpus():
    def samples(accumulation, world_size):
        plan = plan_epoch(many(), [2], 1, 0, accumulation, world_size)
        return [
            {item.picture for rank in step.batches_of_rank for batch in rank for item in batch.items} for step in plan
        ]

    assert samples(4, 1) == samples(2, 2) == samples(1, 4)


def test_table():
    pictures = [picture(0, 0, (64, 64), 3), picture(1, 0, (64, 64), 1), picture(2, 1, (128, 64), 2)]
    rows = [line.split() for line in bucket_table(pictures, [3, 1]).splitlines()[1:]]
    assert rows == [["0", "64x64", "2", "4", "2"], ["1", "128x64", "1", "2", "2"]]
