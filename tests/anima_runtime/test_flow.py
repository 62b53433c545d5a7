"""Flow matching against plain maths."""

import math

import pytest
import torch

from library.anima_runtime.flow import (
    ObjectiveSettings,
    add_noise,
    draw_noise,
    draw_timesteps,
    shift_timesteps,
    velocity_losses,
    velocity_target,
)

KEYS = [(epoch, f"0/0/{name}.png", repeat) for epoch in range(4) for name in range(250) for repeat in range(4)]


def test_shift_of_three_moves_the_middle_to_three_quarters():
    shifted = shift_timesteps(torch.tensor([0.0, 0.5, 1.0]), 3.0)
    assert shifted.tolist() == pytest.approx([0.0, 0.75, 1.0])


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_logit_normal_timesteps_have_a_normal_logit_before_the_shift(scale):
    t = draw_timesteps(KEYS, 1, ObjectiveSettings(anima_sigmoid_scale=scale, anima_flow_shift=3.0), "cpu").double()
    before_shift = t / (3 - 2 * t)
    logit = torch.log(before_shift / (1 - before_shift))
    assert logit.mean().item() == pytest.approx(0, abs=4 * scale / math.sqrt(len(KEYS)))
    assert logit.std().item() == pytest.approx(scale, rel=0.05)


def test_uniform_timesteps_without_shift_fill_the_unit_interval():
    t = draw_timesteps(KEYS, 1, ObjectiveSettings("uniform", anima_flow_shift=1.0), "cpu")
    counts = torch.histc(t, bins=10, min=0, max=1)
    assert counts.sum() == len(KEYS)
    assert (counts / len(KEYS)).tolist() == pytest.approx([0.1] * 10, abs=0.025)


def test_draws_follow_from_the_key_and_not_from_their_order():
    settings = ObjectiveSettings()
    latents = torch.zeros(3, 16, 1, 4, 6)
    keys = KEYS[:3]
    t, noise = draw_timesteps(keys, 7, settings, "cpu"), draw_noise(keys, 7, latents)
    backwards = keys[::-1]
    assert torch.equal(draw_timesteps(backwards, 7, settings, "cpu"), t.flip(0))
    assert torch.equal(draw_noise(backwards, 7, latents), noise.flip(0))
    assert not torch.equal(draw_noise(keys, 8, latents), noise)
    assert len(set(t.tolist())) == 3


def test_noise_differs_between_purposes_epochs_pictures_and_repeats():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    noise = draw_noise(keys, 0, torch.zeros(4, 16, 1, 8, 8)).flatten(1)
    correlation = torch.corrcoef(noise)
    assert (correlation - torch.eye(4)).abs().max() < 0.15


def test_loss_on_fixed_noise_and_timestep_equals_plain_maths():
    generator = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(2, 16, 1, 4, 4, generator=generator) for _ in range(2))
    t = torch.tensor([0.25, 0.9])
    noisy = add_noise(x0, noise, t)
    weight = 0.3

    losses = velocity_losses(noisy * weight, velocity_target(x0, noise))

    for b in range(2):
        total = 0.0
        for x, e in zip(x0[b].flatten().tolist(), noise[b].flatten().tolist(), strict=True):
            x_t = (1 - t[b].item()) * x + t[b].item() * e
            total += (weight * x_t - (e - x)) ** 2
        assert losses[b].item() == pytest.approx(total / x0[b].numel(), rel=1e-5)


def test_loss_is_float32_when_the_model_answers_in_bf16():
    x0, noise = torch.randn(2, 1, 16, 1, 4, 4).unbind()
    assert velocity_losses((noise - x0).bfloat16(), velocity_target(x0, noise)).dtype == torch.float32
    assert velocity_losses(noise - x0, velocity_target(x0, noise)).item() == 0
