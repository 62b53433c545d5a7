"""What a run will take: the costs of steps, the sums made of them, and the advice where memory is short."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from library.errors import SettingError
from library.training import preflight
from library.training.preflight import Cost, DoesNotFitError, Trial, check_fit, check_preflight, cost_of, expected_time
from library.training.run import RunSettings

GIB = 2**30
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def trial(bucket, batch_size, steps=1.0, seconds=1.0, peak=0, lasting=0):
    return Trial(bucket, batch_size, steps, Cost(seconds, peak, lasting, reserved=2 * peak))


def test_the_first_step_does_not_count():
    pauses = iter([0.5, 0.02])
    cost = cost_of(lambda: time.sleep(next(pauses)), CPU)
    assert 0.02 <= cost.seconds < 0.3
    assert next(pauses, None) is None
    assert 2**24 < cost.peak < 2**40


@pytest.mark.parametrize("fatal", [1, 2])
def test_a_step_that_runs_out_of_memory_has_no_cost(fatal):
    calls = []

    def step():
        calls.append(1)
        if len(calls) == fatal:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert cost_of(step, CPU) is None


def test_an_error_of_another_kind_is_not_taken_for_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        cost_of(lambda: (_ for _ in ()).throw(RuntimeError("shapes")), CPU)


def test_steps_are_weighted_by_bucket():
    """An epoch of 10 * 0.5 s + 2.5 * 4 s; 25 steps are two epochs of 12.5."""
    trials = [trial((512, 512), 4, steps=10, seconds=0.5), trial((1024, 1024), 4, steps=2.5, seconds=4)]
    assert preflight.epoch_seconds(trials) == 15
    assert expected_time(trials, steps=25, steps_an_epoch=12).startswith(
        "time: about 31 s for 25 steps, which are 2.1 epochs of 15 s;"
    )


def test_the_time_is_unknown_where_a_bucket_does_not_fit():
    trials = [trial((512, 512), 4), Trial((1024, 1024), 4, 1.0, None)]
    assert preflight.epoch_seconds(trials) is None
    assert expected_time(trials, 25, 12) == "time: unknown, as it does not fit"


def test_a_table_of_a_card():
    trials = [trial((512, 768), 4, 10, 0.5, 3 * GIB), Trial((1024, 1024), 4, 2.25, None)]
    assert preflight.trial_table(trials, CUDA) == (
        "     bucket  batch  steps an epoch  seconds a step  peak memory    reserved\n"
        "    512x768      4            10.0           0.500      3.0 GiB     6.0 GiB\n"
        "  1024x1024      4             2.2  out of memory"
    )


def test_what_fits_needs_no_advice():
    assert check_fit([trial((512, 512), 4, peak=10 * GIB)], 10 * GIB, 1, ["fp8_base = true"]) is None
    assert check_fit([trial((512, 512), 4, peak=10 * GIB)], None, 1, []) is None


def test_a_peak_near_the_limit_is_warned_of_with_the_batch_that_fits():
    """2 GiB stay and each picture of 512x512 takes 2 GiB: below 9 GiB there is room for 3."""
    warning = check_fit([trial((512, 512), 4, peak=10 * GIB, lasting=2 * GIB)], 9 * GIB, 2, ["fp8_base = true"])
    assert warning.startswith(
        "preflight: with a batch of 4 x 512x512 pixels, more than 95% of the GPU's memory is in use;"
    )
    assert warning.endswith(
        "What needs less memory: fp8_base = true; batch_size = 3 with gradient_accumulation_steps = 3; "
        "a smaller resolution"
    )


def test_the_batch_that_fits_follows_from_smaller_buckets():
    """A picture of 512x512 takes 2 GiB, so one of 1024x1024 takes 8: of 2 + 4 * 8 GiB, 20 have room for 2."""
    trials = [trial((512, 512), 4, peak=10 * GIB, lasting=2 * GIB), Trial((1024, 1024), 4, 1.0, None)]
    with pytest.raises(DoesNotFitError) as caught:
        check_fit(trials, 20 * GIB, 1, [])
    assert str(caught.value) == (
        "preflight: out of GPU memory in a batch of 4 x 1024x1024 pixels. What needs less memory: "
        "batch_size = 2 with gradient_accumulation_steps = 2; a smaller resolution"
    )


@pytest.mark.parametrize(("limit", "batch_size"), [(9 * GIB, 4), (40 * GIB, 1)])
def test_a_batch_that_cannot_be_small_enough_is_not_proposed(limit, batch_size):
    trials = [trial((512, 512), 4, peak=10 * GIB, lasting=2 * GIB), Trial((1024, 1024), batch_size, 1.0, None)]
    with pytest.raises(DoesNotFitError, match=r"What needs less memory: a smaller resolution$"):
        check_fit(trials, limit, 1, [])


def test_half_the_batch_is_proposed_where_nothing_ran():
    with pytest.raises(DoesNotFitError, match=r"batch_size = 2 with gradient_accumulation_steps = 8;"):
        check_fit([Trial((1024, 1024), 5, 1.0, None)], 40 * GIB, 3, [])


def test_what_others_use_of_a_card_is_not_there(monkeypatch):
    """Of 100, 30 are free and 50 are this process's: others have 20, so 95 % leave it 75."""
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(mem_get_info=lambda d: (30, 100), memory_reserved=lambda d: 50))
    assert preflight.memory_limit(CUDA) == 75
    assert preflight.memory_limit(CPU) is None


def test_what_contradicts_a_preflight_is_refused():
    check_preflight(RunSettings(preflight=True), processes=1)
    check_preflight(RunSettings(dry_run=True), processes=2)
    with pytest.raises(SettingError, match=r"^preflight: dry_run loads no model"):
        check_preflight(RunSettings(preflight=True, dry_run=True), processes=1)
    with pytest.raises(SettingError, match=r"^preflight: it measures one GPU, and 2 processes"):
        check_preflight(RunSettings(preflight=True), processes=2)
