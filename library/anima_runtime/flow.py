"""Flow matching: how latents, noise and timestep make up the training objective.

Anima is a rectified flow: x_t = (1 - t) x_0 + t ε, and the model predicts the velocity v = ε - x_0 (Liu et al., 2022,
"Flow Straight and Fast"). t = 0 is the picture, t = 1 is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.options import option
from library.randomness import torch_generator

# (epoch, picture, repeat): one use of one picture in a run, from which its noise and timestep follow.
SampleKey = tuple[int, str, int]


@dataclass(frozen=True)
class ObjectiveSettings:
    """Which timesteps the model is trained at."""

    anima_timestep_sampling: str = option(
        "logit_normal", "How t is drawn before the shift.", choices=("logit_normal", "uniform")
    )
    anima_sigmoid_scale: float = option(1.0, "logit_normal draws t = sigmoid(scale x N(0, 1)).")
    anima_flow_shift: float = option(3.0, "Shifts t towards noise: s t / (1 + (s - 1) t); 1 leaves it alone.")


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Moves timesteps in [0, 1] towards noise (Esser et al., 2024, "Scaling Rectified Flow Transformers", eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def draw_timesteps(
    keys: Sequence[SampleKey], seed: int, settings: ObjectiveSettings, device: torch.device | str
) -> Tensor:
    """One shifted timestep per sample: float32 [B] in (0, 1)."""

    def draw(key: SampleKey) -> Tensor:
        generator = torch_generator(seed, "timestep", *key, device=device)
        if settings.anima_timestep_sampling == "uniform":
            return torch.rand((), generator=generator, device=device)
        return torch.sigmoid(settings.anima_sigmoid_scale * torch.randn((), generator=generator, device=device))

    return shift_timesteps(torch.stack([draw(key) for key in keys]), settings.anima_flow_shift)


def draw_noise(keys: Sequence[SampleKey], seed: int, latents_BCTHW: Tensor) -> Tensor:
    """Standard normal noise, float32, in the shape and on the device of the latents."""
    device = latents_BCTHW.device
    shape = latents_BCTHW.shape[1:]
    generators = [torch_generator(seed, "noise", *key, device=device) for key in keys]
    return torch.stack([torch.randn(shape, generator=generator, device=device) for generator in generators])


def add_noise(latents_BCTHW: Tensor, noise_BCTHW: Tensor, timesteps_B: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t ε in float32."""
    t = timesteps_B.view(-1, 1, 1, 1, 1)
    return (1 - t) * latents_BCTHW.float() + t * noise_BCTHW


def velocity_target(latents_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """v = ε - x_0 in float32."""
    return noise_BCTHW - latents_BCTHW.float()


def velocity_losses(velocity_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """Mean squared error of each sample: float32 [B]."""
    return (velocity_BCTHW.float() - target_BCTHW).square().mean(dim=(1, 2, 3, 4))
