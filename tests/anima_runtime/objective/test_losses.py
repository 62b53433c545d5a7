"""Losses against plain maths and diffusers."""

import math

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from library.anima_runtime.objective.losses import LossSettings, elementwise_losses, huber_thresholds, timestep_weights

T = torch.tensor([0.0, 0.25, 0.9, 1.0])


def losses_of(errors, t=0.5, **settings) -> list[float]:
    """The loss of each error at timestep t."""
    velocity = torch.tensor(errors, dtype=torch.float32).view(1, -1, 1, 1, 1)
    target = torch.zeros_like(velocity)
    return elementwise_losses(velocity, target, torch.tensor([t]), LossSettings(**settings)).flatten().tolist()


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("l2", lambda d, c: d * d),
        ("l1", lambda d, c: abs(d)),
        ("huber", lambda d, c: 2 * c * (math.sqrt(d * d + c * c) - c)),
        ("smooth_l1", lambda d, c: 2 * (math.sqrt(d * d + c * c) - c)),
    ],
)
def test_each_loss_type_equals_its_formula(loss_type, expected):
    errors = [-3.0, -0.5, 0.0, 0.01, 0.2, 7.0]
    losses = losses_of(errors, loss_type=loss_type, huber_schedule="constant", huber_c=0.2)
    assert losses == pytest.approx([expected(error, 0.2) for error in errors], rel=1e-5, abs=1e-7)


def test_huber_tends_to_l2_and_smooth_l1_to_l1():
    small, large = 1e-3, 1e3
    assert losses_of([small], loss_type="huber", huber_c=0.5, huber_schedule="constant")[0] == pytest.approx(small**2)
    smooth = losses_of([large], loss_type="smooth_l1", huber_c=0.5, huber_schedule="constant")[0]
    assert smooth == pytest.approx(2 * large, rel=1e-3)


def test_thresholds_follow_their_schedule():
    def thresholds(schedule, scale=1.0):
        settings = LossSettings(huber_schedule=schedule, huber_c=0.1, huber_scale=scale)
        return huber_thresholds(T, settings).tolist()

    assert thresholds("constant") == pytest.approx([0.1] * 4)
    assert thresholds("exponential") == pytest.approx([1.0, 0.1**0.25, 0.1**0.9, 0.1])
    ratios = [0.0, 0.25 / 0.75, 0.9 / 0.1]  # of noise to picture
    expected = [0.9 / (1 + ratio) ** 2 + 0.1 for ratio in ratios]
    assert thresholds("snr") == pytest.approx([*expected, 0.1], rel=1e-5)
    assert thresholds("snr", scale=0.5) == pytest.approx([value / 2 for value in thresholds("snr")])


def test_the_threshold_of_a_sample_is_that_of_its_timestep():
    settings = LossSettings(loss_type="huber")  # the default schedule
    velocity = torch.full((4, 2, 1, 3, 3), 0.7)
    losses = elementwise_losses(velocity, torch.zeros_like(velocity), T, settings)
    for row, c in enumerate(huber_thresholds(T, settings).tolist()):
        assert losses[row].min() == losses[row].max()
        assert losses[row, 0, 0, 0, 0].item() == pytest.approx(2 * c * (math.sqrt(0.49 + c * c) - c), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_losses_are_float32_and_their_gradients_finite(loss_type):
    target = torch.randn(4, 16, 1, 4, 4)
    velocity = target.bfloat16().requires_grad_()
    losses = elementwise_losses(velocity, velocity.detach().float(), T, LossSettings(loss_type=loss_type))
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.abs().max() == 0
    assert velocity.grad.isfinite().all()


@pytest.mark.parametrize("scheme", ["none", "uniform", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_weights_equal_those_of_diffusers(scheme):
    t = torch.tensor([0.001, 0.2, 0.5, 0.98, 1.0])
    expected = compute_loss_weighting_for_sd3(scheme, t)
    torch.testing.assert_close(timestep_weights(t, scheme), expected, rtol=1e-5, atol=0)


def test_the_steepest_weight_is_bounded():
    assert timestep_weights(torch.tensor([0.0]), "sigma_sqrt").item() == pytest.approx(1e6)
