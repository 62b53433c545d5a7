"""Noise against its formulas."""

import pytest
import torch

from library.anima_runtime.objective.noise import NoiseSettings, draw_noise, perturb_noise

KEYS = [(epoch, f"{name}.png", 0) for epoch in range(2) for name in range(4)]


def noise_of(keys=KEYS, seed=7, side=8, **settings) -> torch.Tensor:
    return draw_noise(keys, seed, NoiseSettings(**settings), torch.zeros(len(keys), 16, 1, side, side))


def test_draws_follow_from_the_key_and_not_from_their_order():
    options = {"anima_noise_offset": 0.1, "multires_noise_iterations": 3, "noise_offset_random_strength": True}
    for settings in ({}, options):
        noise = noise_of(**settings)
        torch.testing.assert_close(noise_of(KEYS[::-1], **settings), noise.flip(0), rtol=0, atol=0)
        assert not torch.equal(noise_of(seed=8, **settings), noise)


def test_noise_differs_between_seeds_epochs_pictures_and_repeats():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    correlation = torch.corrcoef(noise_of(keys).flatten(1))
    assert (correlation - torch.eye(4)).abs().max() < 0.15


def test_an_offset_adds_one_value_to_each_channel():
    added = noise_of(anima_noise_offset=0.1) - noise_of()
    assert torch.allclose(added, added.mean(dim=(3, 4), keepdim=True).expand_as(added), atol=1e-6)
    channels = added[..., 0, 0].flatten()
    assert channels.std().item() == pytest.approx(0.1, rel=0.2)  # 128 values: 6 % standard error
    assert channels.mean().item() == pytest.approx(0, abs=0.04)
    torch.testing.assert_close(noise_of(anima_noise_offset=0.3) - noise_of(), 3 * added, rtol=0, atol=1e-5)


def test_a_random_offset_strength_lies_between_zero_and_the_offset_and_differs_between_samples():
    keys = [(0, f"{name}.png", 0) for name in range(200)]
    fixed, plain = noise_of(keys, side=2, anima_noise_offset=0.1), noise_of(keys, side=2)
    random = noise_of(keys, side=2, anima_noise_offset=0.1, noise_offset_random_strength=True)
    added, least = random - plain, (fixed - plain).abs() > 1e-3
    shares = torch.stack([(a / f)[m].mean() for a, f, m in zip(added, fixed - plain, least, strict=True)])
    assert shares.min() > -1e-3 and shares.max() < 1 + 1e-3
    assert shares.mean().item() == pytest.approx(0.5, abs=0.1)
    assert shares.std().item() == pytest.approx(12**-0.5, abs=0.05)


def test_multires_noise_equals_its_formula():
    """One further level on 2 x 2 latents is one value a channel: (ε + d η) over its root mean square."""
    plain = noise_of(side=2)
    for discount in (0.3, 0.9):
        noise = noise_of(side=2, multires_noise_iterations=1, multires_noise_discount=discount)
        for sample, before in zip(noise, plain, strict=True):
            # the scale is known from differences within a channel, which η does not change
            inside, inside_before = (x - x.mean(dim=(2, 3), keepdim=True) for x in (sample, before))
            scale = (inside * inside_before).sum() / inside_before.square().sum()
            torch.testing.assert_close(inside, scale * inside_before, rtol=0, atol=1e-5)
            eta = ((sample / scale - before) / discount).mean(dim=(2, 3))
            assert eta.square().mean().item() == pytest.approx(1, abs=1.1)
            assert sample.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_each_level_of_multires_noise_is_weaker_by_the_discount():
    """Of 4 x 4 latents a channel's mean has the variance (1/16 + d²/4 + d⁴) / rms²: ε, 2 x 2 values, one value.

    2 values enlarged to 4 have the mean square 13/16, so that rms² is 1 + (13/16)² d² + d⁴ on average.
    """
    keys = [(0, f"{name}.png", 0) for name in range(300)]
    d = 0.5
    means = noise_of(keys, side=4, multires_noise_iterations=9, multires_noise_discount=d).mean(dim=(2, 3, 4))
    expected = (1 / 16 + d**2 / 4 + d**4) / (1 + (13 / 16) ** 2 * d**2 + d**4)
    assert means.square().mean().item() == pytest.approx(expected, rel=0.08)  # 4800 values: 2 % standard error


def test_multires_noise_correlates_neighbours_and_keeps_its_strength():
    def neighbours(noise):
        return (noise[..., 1:] * noise[..., :-1]).mean().item()

    options = {"multires_noise_iterations": 6, "multires_noise_discount": 0.8}
    assert neighbours(noise_of(side=32)) == pytest.approx(0, abs=0.01)
    assert neighbours(noise_of(side=32, **options)) > 0.4
    assert noise_of(side=32, **options).square().mean().item() == pytest.approx(1, abs=1e-5)
    # it ends where a side has one value left
    assert torch.equal(noise_of(side=8, multires_noise_iterations=3), noise_of(side=8, multires_noise_iterations=16))


def test_input_noise_is_perturbed_by_gamma():
    noise = noise_of()
    assert torch.equal(perturb_noise(noise, KEYS, 7, NoiseSettings()), noise)
    more = perturb_noise(noise, KEYS, 7, NoiseSettings(ip_noise_gamma=0.1)) - noise
    assert more.std().item() == pytest.approx(0.1, rel=0.03)
    assert torch.corrcoef(torch.stack([more.flatten(), noise.flatten()]))[0, 1].abs() < 0.05
    random = perturb_noise(noise, KEYS, 7, NoiseSettings(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True))
    shares = (random - noise).flatten(1).std(dim=1) / more.flatten(1).std(dim=1)
    assert shares.min() > 0 and shares.max() < 1 and shares.std() > 0.1
