"""The noise that training mixes into latents. It follows from (epoch, picture, repeat), not from earlier draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library.anima_runtime.objective.flow import SampleKey
from library.options import option
from library.randomness import python_random, torch_generator


@dataclass(frozen=True)
class NoiseSettings:
    """What is done to the noise."""

    anima_noise_offset: float = option(
        0.0,
        "Adds this much noise that is one value for each whole latent channel, so that very dark and very bright "
        "pictures are learned. 0 is off; 0.03 to 0.1 is usual.",
        aliases=("noise_offset",),
    )
    noise_offset_random_strength: bool = option(
        False, "Draw the noise offset anew at each use, between 0 and anima_noise_offset."
    )
    multires_noise_iterations: int = option(
        0, "Adds noise at this many coarser resolutions, each half the one before. 0 is off; 6 to 8 is usual."
    )
    multires_noise_discount: float = option(
        0.3, "Strength of each coarser noise relative to the one before; 0.1 to 0.3 is usual."
    )
    ip_noise_gamma: float = option(
        0.0,
        "Adds this much further noise to what the model sees, but not to what it must answer, which hardens it "
        "against its own errors while sampling. 0 is off; 0.1 is usual.",
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "Draw the strength of that noise anew at each use, between 0 and ip_noise_gamma."
    )


def draw_noise(keys: Sequence[SampleKey], seed: int, settings: NoiseSettings, latents_BCTHW: Tensor) -> Tensor:
    """The noise ε of each sample, float32, in the shape and on the device of the latents.

    Multi-resolution noise, scaled back to a mean square of 1, comes first; the offset is added to it.
    """
    return torch.stack([_sample_noise(key, seed, settings, latents_BCTHW[0]) for key in keys])


def perturb_noise(noise_BCTHW: Tensor, keys: Sequence[SampleKey], seed: int, settings: NoiseSettings) -> Tensor:
    """The noise for the model's input: ε + γ ζ (Ning et al., 2023, "Input Perturbation Reduces Exposure Bias").

    The target keeps ε.
    """
    if not settings.ip_noise_gamma:
        return noise_BCTHW
    is_random = settings.ip_noise_gamma_random_strength
    strengths = [_strength(settings.ip_noise_gamma, is_random, "ip_noise_gamma", seed, key) for key in keys]
    more = [
        strength * _normal(noise_BCTHW.shape[1:], seed, "ip_noise", key, noise_BCTHW.device)
        for strength, key in zip(strengths, keys, strict=True)
    ]
    return noise_BCTHW + torch.stack(more)


def _sample_noise(key: SampleKey, seed: int, settings: NoiseSettings, like_CTHW: Tensor) -> Tensor:
    device, shape = like_CTHW.device, like_CTHW.shape
    noise = _normal(shape, seed, "noise", key, device)
    if settings.multires_noise_iterations:
        noise = _add_coarser_noise(noise, key, seed, settings)
    if settings.anima_noise_offset:
        is_random = settings.noise_offset_random_strength
        strength = _strength(settings.anima_noise_offset, is_random, "noise_offset_strength", seed, key)
        noise = noise + strength * _normal((shape[0], 1, 1, 1), seed, "noise_offset", key, device)
    return noise


def _add_coarser_noise(noise_CTHW: Tensor, key: SampleKey, seed: int, settings: NoiseSettings) -> Tensor:
    """ε + Σ dⁱ up(η_i), where η_i has sides of 1/2ⁱ, up to one value for the picture; then a mean square of 1."""
    height, width = noise_CTHW.shape[-2:]
    total = noise_CTHW
    for level in range(1, settings.multires_noise_iterations + 1):
        size = (max(1, height >> level), max(1, width >> level))
        shape = (*noise_CTHW.shape[:2], *size)
        coarse = _normal(shape, seed, f"multires_noise_{level}", key, noise_CTHW.device)
        total = total + settings.multires_noise_discount**level * F.interpolate(
            coarse, size=(height, width), mode="bilinear", align_corners=False
        )
        if size == (1, 1):
            break
    return total / total.square().mean().sqrt()


def _strength(greatest: float, is_random: bool, purpose: str, seed: int, key: SampleKey) -> float:
    return greatest * python_random(seed, purpose, *key).random() if is_random else greatest


def _normal(shape: Sequence[int], seed: int, purpose: str, key: SampleKey, device: torch.device) -> Tensor:
    generator = torch_generator(seed, purpose, *key, device=device)
    return torch.randn(tuple(shape), generator=generator, device=device)
