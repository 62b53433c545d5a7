"""What is kept of each step until a log point."""

from pathlib import Path

import torch

from library.training.step_records import SampleLoss, StepRecord, StepRecords


def add(records: StepRecords, names: str, rows: list[int], timesteps: list[float], losses: list[float]) -> None:
    numbers = (torch.tensor(rows), torch.tensor(timesteps), torch.tensor(losses))
    records.add([Path(name) for name in names], *numbers)


def read(records: StepRecords, step: int) -> list[StepRecord]:
    records.start(step, torch.tensor(0.5))
    found, extra = records.finish()
    assert extra == 0.5
    return found


def test_samples_are_given_back_with_their_pictures_by_step():
    records = StepRecords(lambda own: own)
    add(records, "abc", [2, 0], [0.5, 0.25], [1.0, 2.0])
    add(records, "abc", [1], [0.75], [4.0])
    records.close_step(torch.tensor(7.0), torch.tensor(3.0))
    records.close_step(torch.tensor(float("nan")), torch.tensor(1.0))
    add(records, "d", [0], [0.125], [8.0])
    first, second = read(records, 11)
    samples = [("c", 0.5, 1.0), ("a", 0.25, 2.0), ("b", 0.75, 4.0)]
    assert first == StepRecord(10, 7.0, 3.0, tuple(SampleLoss(Path(name), *rest) for name, *rest in samples))
    assert first.is_finite
    assert (second.step, second.samples, second.is_finite) == (11, (), False)


def test_each_step_is_read_once_and_a_running_one_later():
    records = StepRecords(lambda own: own)
    assert read(records, 0) == []
    records.close_step(torch.tensor(1.0), torch.tensor(float("inf")))
    (record,) = read(records, 1)
    assert not record.is_finite
    add(records, "a", [0], [0.5], [2.0])
    assert read(records, 1) == []
    records.close_step(torch.tensor(2.0), torch.tensor(1.0))
    (record,) = read(records, 2)
    assert record == StepRecord(2, 2.0, 1.0, (SampleLoss(Path("a"), 0.5, 2.0),))


def test_samples_of_all_processes_are_put_together():
    other = [[[SampleLoss(Path("other"), 0.5, 3.0)]]]
    records = StepRecords(lambda own: own + other)
    add(records, "a", [0], [0.25], [1.0])
    records.close_step(torch.tensor(2.0), torch.tensor(1.0))
    (record,) = read(records, 1)
    assert [(str(sample.path), sample.loss) for sample in record.samples] == [("a", 1.0), ("other", 3.0)]


def test_steps_that_close_meanwhile_are_read_the_next_time():
    records = StepRecords(lambda own: own)
    records.close_step(torch.tensor(1.0), torch.tensor(0.0))
    records.start(1, torch.tensor(0.0))
    records.close_step(torch.tensor(2.0), torch.tensor(0.0))
    assert [(record.step, record.loss) for record in records.finish()[0]] == [(1, 1.0)]
    assert [(record.step, record.loss) for record in read(records, 2)] == [(2, 2.0)]
