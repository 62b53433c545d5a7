"""Flow matching: how latents, noise and timestep make up the model's input and target.

Anima is a rectified flow: x_t = (1 - t) x_0 + t ε, and the model predicts the velocity v = ε - x_0 (Liu et al., 2022,
"Flow Straight and Fast"). t = 0 is the picture, t = 1 is noise.
"""

from __future__ import annotations

from torch import Tensor

# (epoch, picture, repeat): one use of one picture in a run, from which its noise and timestep follow.
SampleKey = tuple[int, str, int]


def add_noise(latents_BCTHW: Tensor, noise_BCTHW: Tensor, timesteps_B: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t ε in float32."""
    t = timesteps_B.view(-1, 1, 1, 1, 1)
    return (1 - t) * latents_BCTHW.float() + t * noise_BCTHW


def velocity_target(latents_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """v = ε - x_0 in float32."""
    return noise_BCTHW - latents_BCTHW.float()
