"""The samplers that pictures can be rendered with, by ComfyUI's names; each steps from noise to latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

# A signal-to-noise ratio of 0, at sigma 1, has no logarithm, which the multistep samplers take.
_GREATEST_SIGMA = 1 - 1e-6


def simple_sigmas(steps: int, shift: float) -> list[float]:
    """Schedule 'simple': s u / (1 + (s - 1) u) with u = 1 - i/n for step i of n, then 0."""
    shares = [1 - number / steps for number in range(steps + 1)]
    return [shift * share / (1 + (shift - 1) * share) for share in shares]


def make_sampler(name: str, steps: int, shift: float, seed: int, device: torch.device) -> SchedulerMixin | Ancestral:
    """A sampler with `sigmas`, one for each evaluation of the model and a last one, `timesteps`, and `step`.

    name: ComfyUI's. From a number of steps alone diffusers' schedulers would take other sigmas, or shift them twice, so
    they are given theirs.
    """
    sigmas = simple_sigmas(steps, shift)
    if name == "euler_ancestral":
        return Ancestral(sigmas, seed, device)
    if name == "euler":
        sampler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        sampler.set_timesteps(sigmas=sigmas[:-1], device=device)
    elif name == "heun":
        sampler = FlowMatchHeunDiscreteScheduler()
        sampler.set_timesteps(steps)
        _set_sigmas(sampler, [sigmas[0], *(sigma for sigma in sigmas[1:-1] for _ in range(2)), 0.0], device)
    else:
        kind = DPMSolverMultistepScheduler if name == "dpmpp_2m" else UniPCMultistepScheduler
        sampler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
        sampler.set_timesteps(steps)
        _set_sigmas(sampler, [min(sigma, _GREATEST_SIGMA) for sigma in sigmas], device)
    sampler.set_begin_index(0)
    return sampler


def _set_sigmas(sampler: SchedulerMixin, sigmas: list[float], device: torch.device) -> None:
    sampler.sigmas = torch.tensor(sigmas)
    sampler.timesteps = 1000 * sampler.sigmas[:-1].to(device)


class _Step(NamedTuple):
    prev_sample: Tensor


class Ancestral:
    """Euler steps that go further than asked, and come back by fresh noise (ComfyUI's euler_ancestral for flows).

    From sigma to sigma' a step goes down to d = sigma'^2 / sigma. With x_d = (1 - d) x0 + d e, the sum
    a x_d + r e' with a = (1 - sigma') / (1 - d) has the signal of sigma', and its noise where
    r^2 = sigma'^2 - (a d)^2.
    """

    def __init__(self, sigmas: list[float], seed: int, device: torch.device) -> None:
        self.sigmas = torch.tensor(sigmas, device=device)
        self.timesteps = range(len(sigmas) - 1)
        self._exact = sigmas
        # The seed's own generator gives the noise to start from.
        self._generator = torch.Generator("cpu").manual_seed((seed + 1) % 2**63)

    def step(self, velocity: Tensor, number: int, latents: Tensor) -> _Step:
        """The latents after step `number`, of `timesteps`."""
        sigma, following = self._exact[number], self._exact[number + 1]
        down = following**2 / sigma
        latents = latents + (down - sigma) * velocity
        if following == 0:
            return _Step(latents)
        scale = (1 - following) / (1 - down)
        strength = (following**2 - (scale * down) ** 2) ** 0.5
        noise = torch.randn(latents.shape, generator=self._generator).to(latents.device)
        return _Step(scale * latents + strength * noise)
