"""Samplers against plain maths: exact on straight flows, near on curved ones, of the right spread with fresh noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from library.anima_runtime.sampling.samplers import make_sampler, simple_sigmas
from library.anima_runtime.sampling.settings import SAMPLERS

NAMES = sorted(set(SAMPLERS.values()))
DETERMINISTIC = [name for name in NAMES if name != "euler_ancestral"]


def sample(name, velocity, noise, steps, shift=3.0, seed=0):
    """The latents at the end, and the sigmas at which the velocity was asked for."""
    sampler, latents, asked = make_sampler(name, steps, shift, seed, torch.device("cpu")), noise, []
    for sigma, place in zip(sampler.sigmas[:-1], sampler.timesteps, strict=True):
        asked.append(float(sigma))
        latents = sampler.step(velocity(latents, float(sigma)), place, latents).prev_sample
    return latents, asked


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_simple_schedule():
    assert simple_sigmas(2, 1.0) == [1.0, 0.5, 0.0]
    assert simple_sigmas(2, 3.0) == pytest.approx([1.0, 0.75, 0.0])


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_asked_at_the_schedules_sigmas(name):
    _, asked = sample(name, lambda x, s: x * 0, normal(1, 2), steps=6)
    expected = simple_sigmas(6, 3.0)[:-1]
    if name == "heun":
        expected = [expected[0], *(sigma for sigma in expected[1:] for _ in range(2))]
    np.testing.assert_allclose(asked, expected, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_single_picture_is_found_in_any_number_of_steps(name, steps):
    """All noise leads to one x0: the velocity at x, sigma is (x - x0) / sigma."""
    x0 = normal(1, 16, 1, 4, 4, seed=1)
    found, _ = sample(name, lambda x, sigma: (x - x0) / sigma, normal(1, 16, 1, 4, 4), steps)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-4)


def gaussian_velocity(x, sigma, spread=0.5):
    """Of pictures that are normal with that spread: (E[e | x] - E[x0 | x]), for x = (1 - sigma) x0 + sigma e."""
    variance = ((1 - sigma) * spread) ** 2 + sigma**2
    return (sigma - (1 - sigma) * spread**2) / variance * x


@pytest.mark.parametrize(("name", "most"), [("euler", 0.15), ("heun", 0.05), ("dpmpp_2m", 0.04), ("uni_pc", 0.04)])
def test_normal_pictures_keep_their_spread(name, most):
    """The flow takes noise x to spread * x exactly; with 20 steps euler is the farthest from it."""
    noise = normal(1, 1000)
    found, _ = sample(name, gaussian_velocity, noise, steps=20)
    error = (found / noise - 0.5).abs().max().item() / 0.5
    assert error < most
    finer, _ = sample(name, gaussian_velocity, noise, steps=40)
    assert (finer / noise - 0.5).abs().max().item() / 0.5 < error / 1.7


def test_heun_by_hand():
    """Each step goes along the mean of the velocities at its two ends; the last, to the picture, along the first."""
    x, sigmas = 1.5, simple_sigmas(4, 3.0)
    for sigma, following in itertools.pairwise(sigmas):
        velocity = gaussian_velocity(x, sigma)
        if following > 0:
            velocity = (velocity + gaussian_velocity(x + (following - sigma) * velocity, following)) / 2
        x += (following - sigma) * velocity
    found, _ = sample("heun", gaussian_velocity, torch.tensor([[1.5]]), steps=4)
    assert found.item() == pytest.approx(x, rel=1e-5)


def test_ancestral_noise_has_the_right_strength():
    """The fresh noise leaves pictures of spread 0.5 with that spread, while they no longer follow the first noise."""
    noise = normal(1, 20000)
    found, _ = sample("euler_ancestral", gaussian_velocity, noise, steps=400, seed=3)
    assert found.std().item() == pytest.approx(0.5, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([found[0], noise[0]]))[0, 1].item()) < 0.2


def test_ancestral_noise_follows_from_the_seed():
    first, again, other = (sample("euler_ancestral", gaussian_velocity, normal(1, 9), 5, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_one_ancestral_step_by_hand():
    sampler = make_sampler("euler_ancestral", 2, 1.0, 7, torch.device("cpu"))
    x, v = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    e = torch.randn(1, 1, generator=torch.Generator().manual_seed(8))
    # From 1 to 0.5 by way of d = 0.25: x_d = 2 - 0.75 * 3; a = 0.5 / 0.75.
    a = 2 / 3
    expected = a * (2 - 0.75 * 3) + math.sqrt(0.25 - (a * 0.25) ** 2) * e
    torch.testing.assert_close(sampler.step(v, 0, x).prev_sample, expected)
