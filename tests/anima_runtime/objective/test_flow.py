"""Flow matching against plain maths."""

import pytest
import torch

from library.anima_runtime.objective.flow import add_noise, velocity_target


def test_input_and_target_equal_plain_maths():
    generator = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(2, 16, 1, 4, 4, generator=generator) for _ in range(2))
    t = torch.tensor([0.25, 0.9])

    noisy, target = add_noise(x0, noise, t), velocity_target(x0, noise)

    for b in range(2):
        for place, (x, e) in enumerate(zip(x0[b].flatten().tolist(), noise[b].flatten().tolist(), strict=True)):
            assert noisy[b].flatten()[place].item() == pytest.approx((1 - t[b].item()) * x + t[b].item() * e, abs=1e-5)
            assert target[b].flatten()[place].item() == pytest.approx(e - x, abs=1e-5)


def test_following_the_target_from_any_timestep_reaches_picture_and_noise():
    x0, noise = torch.randn(2, 1, 16, 1, 4, 4).unbind()
    noisy = add_noise(x0.bfloat16(), noise, torch.tensor([0.3]))
    velocity = velocity_target(x0.bfloat16(), noise)
    assert noisy.dtype == velocity.dtype == torch.float32
    torch.testing.assert_close(noisy - 0.3 * velocity, x0.bfloat16().float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(noisy + 0.7 * velocity, noise, rtol=0, atol=1e-6)
