"""An epoch uses every (picture, repeat) exactly once, whatever the buckets, batches, steps and ranks."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.epochs import Item, bucket_table, largest_batches, plan_epoch, steps_per_epoch
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


@settings(max_examples=60, deadline=None)
@given(
    pictures=pictures_strategy,
    batch_sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    filled=st.sets(st.integers(0, 1)),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_filled_batches_only_add_uses(pictures, batch_sizes, filled, accumulation, world_size, epoch):
    arguments = (pictures, batch_sizes, 7, epoch, accumulation, world_size)
    steps, unfilled = plan_epoch(*arguments, filled), plan_epoch(*arguments)
    assert len(steps) == len(unfilled) == steps_per_epoch(pictures, batch_sizes, accumulation, world_size)
    assert steps == plan_epoch(*arguments, filled)
    used, added = Counter(), Counter()
    for step, plain in zip(steps, unfilled, strict=True):
        real = [batch for rank in step.batches_of_rank for batch in rank if batch.counted]
        assert step.sample_count == sum(len(batch.items) for batch in real)
        for batch, short in zip(real, (b for rank in plain.batches_of_rank for b in rank if b.counted), strict=True):
            (kind,) = {(pictures[item.picture].dataset, pictures[item.picture].bucket) for item in batch.items}
            assert batch.items[: len(short.items)] == short.items  # the others stay as they are
            assert kind[0] not in filled or len(batch.items) == batch_sizes[kind[0]]
            used.update(batch.items)
            added.update({kind: len(batch.items) - len(short.items)})
    expected = {Item(index, repeat) for index, each in enumerate(pictures) for repeat in range(each.repeats)}
    assert set(used) >= expected and set(used.values()) == {1}  # a further use is a further repeat
    assert all(count < batch_sizes[dataset] for (dataset, _), count in added.items())
    further = {item for item in used if item not in expected}
    assert all(item.repeat == pictures[item.picture].repeats or Item(item.picture, item.repeat - 1) in further
               for item in further)  # fmt: skip


def test_filling_is_drawn_anew_and_from_other_batches_first():
    def added(epoch, count=10, size=4):
        steps = plan_epoch(many(count), [size], 1, epoch, 1, 1, {0})
        (batch,) = [
            step.batches_of_rank[0][0] for step in steps if any(i.repeat for i in step.batches_of_rank[0][0].items)
        ]
        return [item.picture for item in batch.items if item.repeat], [item.picture for item in batch.items]

    drawn = Counter()
    for epoch in range(400):
        further, batch = added(epoch)
        assert len(further) == 2 and len(set(batch)) == 4
        drawn.update(further)
    assert all(80 - 4 * 8 < drawn[picture] < 80 + 4 * 8 for picture in range(10))  # 800 of 10 pictures: deviation 8
    assert sorted(added(0, count=1)[1]) == [0, 0, 0, 0]
    assert sorted(Counter(added(0, count=3, size=8)[1]).values()) == [2, 3, 3]


def test_largest_batches_are_filled():
    pictures = [picture(0, 0, (64, 64), 3), picture(1, 0, (128, 64), 9)]
    found = [(each.size, each.uses, len(each.pictures)) for each in largest_batches(pictures, [4])]
    assert found == [(3, 3, 1), (4, 9, 1)]
    assert [(each.size, each.uses) for each in largest_batches(pictures, [4], {0})] == [(4, 4), (4, 12)]


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
    rows = [line.split() for line in bucket_table(pictures, [3, 3], {0}).splitlines()]
    assert rows[0][-2:] == ["filled", "by"]
    assert rows[1:] == [["0", "64x64", "2", "4", "2", "2"], ["1", "128x64", "1", "2", "1", "0"]]
