"""How far the model's velocity is from the target, as one number for each sample.

Tensor work of fixed shapes: nothing here waits for a GPU or branches on what a tensor holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from library.options import option


@dataclass(frozen=True)
class LossSettings:
    """How errors count."""

    loss_type: str = option(
        "l2",
        "l2 squares errors; l1 takes their size, so that outliers weigh less; huber and smooth_l1 square errors well "
        "below the threshold huber_c and take the size of those above. Rates are tuned for l2.",
        choices=("l2", "l1", "huber", "smooth_l1"),
    )
    huber_schedule: str = option(
        "snr",
        "How the threshold falls as noise grows, from huber_scale at the picture to huber_c x huber_scale at noise: "
        "exponential by huber_c^t, snr by the square of the picture's share; constant keeps huber_c x huber_scale.",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option(0.1, "Threshold of huber and smooth_l1 at t = 1, before huber_scale.")
    huber_scale: float = option(1.0, "Multiplies the threshold of huber and smooth_l1 at every t.")


def huber_thresholds(timesteps_B: Tensor, settings: LossSettings) -> Tensor:
    """The threshold c of each sample: float32 [B].

    snr: ((1 - c_1) / (1 + σ)² + c_1) scale, where c_1 is huber_c and σ the ratio of noise to picture. In a rectified
    flow σ = t / (1 - t), so that 1 / (1 + σ) = 1 - t.
    """
    if settings.huber_schedule == "exponential":
        relative = settings.huber_c**timesteps_B
    elif settings.huber_schedule == "snr":
        relative = (1 - settings.huber_c) * (1 - timesteps_B).square() + settings.huber_c
    else:
        relative = torch.full_like(timesteps_B, settings.huber_c)
    return settings.huber_scale * relative


def elementwise_losses(
    velocity_BCTHW: Tensor, target_BCTHW: Tensor, timesteps_B: Tensor, settings: LossSettings
) -> Tensor:
    """The loss of every latent value, float32, in the velocity's shape; with d the error and c the threshold:

    l2: d². l1: |d|. huber: 2c (√(d² + c²) - c). smooth_l1: 2 (√(d² + c²) - c). The last two are pseudo-Huber losses
    (Charbonnier et al., 1997), as Kohya's trainer scales them: huber tends to d², smooth_l1 to 2|d|.
    """
    error = velocity_BCTHW.float() - target_BCTHW
    if settings.loss_type == "l2":
        return error.square()
    if settings.loss_type == "l1":
        return error.abs()
    c = huber_thresholds(timesteps_B, settings).view(-1, 1, 1, 1, 1)
    squared = error.square()
    above = squared / ((squared + c.square()).sqrt() + c)  # √(d² + c²) - c without cancellation
    return 2 * c * above if settings.loss_type == "huber" else 2 * above


def timestep_weights(timesteps_B: Tensor, weighting_scheme: str) -> Tensor:
    """What weighting_scheme multiplies each sample's loss by (Esser et al., 2024, section 3.1): float32 [B].

    cosmap: 2 / (π (1 - 2t + 2t²)). sigma_sqrt: 1/t², where a t below 1/1000 counts as 1/1000. Other schemes: 1.
    """
    if weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * timesteps_B + 2 * timesteps_B.square()))
    if weighting_scheme == "sigma_sqrt":
        return timesteps_B.clamp(min=1e-3) ** -2
    return torch.ones_like(timesteps_B)
