"""What is measured, when, and what the curves say."""

from __future__ import annotations

import pytest
import torch

from library.training.run import RunState
from library.training.watching.validation import Validation, ValidationSettings, measured_shares, validates


def test_shares_are_the_middles_of_equal_parts():
    assert measured_shares(4) == [0.125, 0.375, 0.625, 0.875]
    assert measured_shares(1) == [0.5]


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        # 4 steps an epoch
        ({}, [4, 8, 12]),
        ({"validate_every_n_epochs": 2}, [8]),
        ({"validate_every_n_steps": 5}, [5, 10]),
        ({"validate_every_n_steps": 6, "validate_every_n_epochs": 3}, [6, 12]),
    ],
)
def test_when_it_is_measured(settings, due):
    asked = ValidationSettings(**settings)
    assert [step for step in range(1, 13) if validates(asked, step, step // 4, step % 4 == 0)] == due


def losses_at(batch, share):
    """Sample x at share s has the loss x + s."""
    return torch.tensor(batch) + share


def test_curves_are_means_over_samples_not_batches():
    validation = Validation(
        ValidationSettings(validation_timesteps=2), [[1.0, 2.0, 3.0], [10.0]], [[2.0]], losses_at, lambda rows: rows
    )
    assert validation.curves() == {
        "loss/validation/average": 4.5,
        "loss/validation/trained_pictures": 2.5,
        "loss/validation/gap": 2.0,
        "loss/validation/timestep_1": 4.25,
        "loss/validation/timestep_2": 4.75,
    }


def test_processes_that_share_the_batches_get_what_one_would():
    batches = [[0.1, 0.7], [0.3], [1e8], [0.2, 1e-8]]
    settings = ValidationSettings(validation_timesteps=3)
    alone = Validation(settings, batches, batches, losses_at, lambda rows: rows).curves()
    theirs = []
    Validation(settings, batches[1::2], batches[1::2], losses_at, lambda rows: theirs.append(rows) or rows).curves()
    others = iter(theirs)
    shared = Validation(settings, batches[::2], batches[::2], losses_at, lambda rows: rows + next(others)).curves()
    assert shared == alone
    others = iter(theirs)
    without_batches = Validation(settings, [], [], losses_at, lambda rows: rows + next(others)).curves()
    assert without_batches["loss/validation/average"] == pytest.approx((0.3 + 0.2 + 1e-8) / 3 + 0.5)


def test_no_gradients_are_kept():
    weight = torch.nn.Parameter(torch.ones(1))
    seen = []

    def recorded(batch, share):
        seen.append(weight * share)
        return seen[-1]

    Validation(ValidationSettings(), [0], [0], recorded, lambda rows: rows).curves()
    assert len(seen) == 8 and not any(loss.requires_grad for loss in seen)


def test_the_best_is_less_than_all_before():
    state, best = RunState(), []
    for step, loss in enumerate([0.1, 0.9, 0.8, float("nan"), 0.8, float("-inf"), 0.7]):
        state.step = step
        best.append(state.is_best(loss))
    assert best == [False, True, True, False, False, False, True]
    assert (state.best_validation_loss, state.best_step) == (0.7, 6)
