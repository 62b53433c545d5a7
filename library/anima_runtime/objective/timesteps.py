"""Which timesteps the model is trained at: t = 0 is the picture, t = 1 is noise.

Every distribution is drawn through the inverse of its cumulative distribution function. Limits on t then restrict the
probability that is drawn from, so that the allowed part keeps its shape and nothing piles up at the limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Protocol

import torch

from library.anima_runtime.objective.flow import SampleKey
from library.options import option
from library.randomness import python_random

DEFAULT_SHIFT = 3.0
# Kohya's names for how t is drawn before the shift; under sigma, weighting_scheme says it.
_KOHYA_SAMPLING = {
    "uniform": "uniform",
    "sigmoid": "logit_normal",
    "shift": "logit_normal",
    "flux_shift": "logit_normal",
}
_UNSHIFTED = ("uniform", "sigmoid")
# A range of t that fewer draws than one in a million would fall into is a mistake.
_LEAST_SHARE = 1e-6


@dataclass(frozen=True)
class TimestepSettings:
    """Which timesteps the model is trained at."""

    anima_timestep_sampling: str | None = option(
        None,
        "How t is drawn before the shift: logit_normal favours the middle, uniform takes all alike. "
        "Unset: logit_normal, or what timestep_sampling says.",
        choices=("logit_normal", "uniform"),
    )
    anima_sigmoid_scale: float = option(
        1.0,
        "logit_normal draws t = sigmoid(scale x N(0, 1)): above 1 spreads t towards both ends, below 1 narrows it.",
        aliases=("sigmoid_scale",),
    )
    anima_flow_shift: float | None = option(
        None,
        "Shifts t towards noise, where composition is learned: s t / (1 + (s - 1) t). 1 leaves t alone, which gives "
        "fine detail more weight. Unset: 3, as ComfyUI samples, unless timestep_sampling sets it.",
        aliases=("discrete_flow_shift",),
    )
    timestep_sampling: str | None = option(
        None,
        "Kohya's name for sampling and shift together. sigmoid: logit_normal without shift. uniform: without shift. "
        "shift: logit_normal with discrete_flow_shift. flux_shift: logit_normal with a shift that grows with the "
        "picture. sigma: as weighting_scheme says, with discrete_flow_shift. Unset: anima_timestep_sampling says it.",
        choices=("sigma", *_KOHYA_SAMPLING),
    )
    weighting_scheme: str = option(
        "none",
        "logit_normal and mode say how timestep_sampling sigma draws t; cosmap and sigma_sqrt weigh the loss by t "
        "instead; none and uniform do neither.",
        choices=("none", "uniform", "sigma_sqrt", "logit_normal", "mode", "cosmap"),
    )
    logit_mean: float = option(
        0.0, "Mean of weighting_scheme logit_normal: above 0 draws more of the picture's end, below 0 more noise."
    )
    logit_std: float = option(1.0, "Spread of weighting_scheme logit_normal.")
    mode_scale: float = option(
        1.29, "How strongly weighting_scheme mode favours the middle (above 0) or the ends (below 0)."
    )
    min_timestep: int = option(0, "Least t that is trained, in thousandths: 0 to 1000. 300 leaves fine detail alone.")
    max_timestep: int = option(1000, "Greatest t that is trained, in thousandths. 700 leaves composition alone.")
    show_timesteps: Path | None = option(
        None, "Draw the timesteps this run will train at into this picture (.png, .svg or .pdf), and stop."
    )


class Distribution(Protocol):
    """How t is distributed in [0, 1] before shift and limits."""

    def quantile(self, share: float) -> float:
        """The t that a share of all draws, between 0 and 1 exclusive, lies below."""

    def share_below(self, t: float) -> float:
        """The share of draws below t: the inverse of `quantile`."""


class Uniform:
    """All t alike."""

    def quantile(self, share: float) -> float:
        return share

    def share_below(self, t: float) -> float:
        return t


class LogitNormal:
    """t = sigmoid(N(mean, std))."""

    def __init__(self, mean: float, std: float) -> None:
        self._logit = NormalDist(mean, std)

    def quantile(self, share: float) -> float:
        return (1 + math.tanh(self._logit.inv_cdf(share) / 2)) / 2

    def share_below(self, t: float) -> float:
        if t <= 0 or t >= 1:
            return float(t >= 1)
        return self._logit.cdf(math.log(t / (1 - t)))


class Mode:
    """u + s (cos²(πu/2) - 1 + u) for uniform u (Esser et al., 2024, eq. 20, with u for 1 - u); -1 <= s <= 1.75."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def quantile(self, share: float) -> float:
        return share + self._scale * (math.cos(math.pi * share / 2) ** 2 - 1 + share)

    def share_below(self, t: float) -> float:
        if t <= 0 or t >= 1:
            return float(t >= 1)
        low, high = 0.0, 1.0
        for _ in range(52):  # as many halvings as a float has bits
            middle = (low + high) / 2
            low, high = (middle, high) if self.quantile(middle) < t else (low, middle)
        return high


def distribution(settings: TimestepSettings) -> Distribution:
    """What t is drawn from before the shift."""
    if settings.timestep_sampling == "sigma":
        if settings.weighting_scheme == "logit_normal":
            # Kohya counts its timesteps down from noise, so the mean is that of logit(1 - t).
            return LogitNormal(-settings.logit_mean, settings.logit_std)
        return Mode(settings.mode_scale) if settings.weighting_scheme == "mode" else Uniform()
    if base_sampling(settings) == "uniform":
        return Uniform()
    return LogitNormal(0.0, settings.anima_sigmoid_scale)


def base_sampling(settings: TimestepSettings) -> str:
    """logit_normal, uniform or, where weighting_scheme decides, sigma."""
    if settings.timestep_sampling is not None:
        return _KOHYA_SAMPLING.get(settings.timestep_sampling, "sigma")
    return settings.anima_timestep_sampling or "logit_normal"


def flow_shift(settings: TimestepSettings, size: tuple[int, int]) -> float:
    """The shift for a picture of (width, height) pixels.

    flux_shift: exp(μ), where μ goes linearly from 0.5 at 256 patches of 16 x 16 pixels to 1.15 at 4096 (Black Forest
    Labs, FLUX.1).
    """
    if settings.timestep_sampling in _UNSHIFTED:
        return 1.0
    if settings.timestep_sampling == "flux_shift":
        patches = (size[0] // 16) * (size[1] // 16)
        return math.exp(0.5 + (1.15 - 0.5) * (patches - 256) / (4096 - 256))
    return DEFAULT_SHIFT if settings.anima_flow_shift is None else settings.anima_flow_shift


def shift_timestep(t: float, shift: float) -> float:
    """Moves t in [0, 1] towards noise (Esser et al., 2024, "Scaling Rectified Flow Transformers", eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def allowed_shares(settings: TimestepSettings, size: tuple[int, int], offset: int = 0) -> tuple[float, float]:
    """The least and greatest share of `distribution` whose t, shifted and moved by `offset`, lies within the limits."""
    drawn, unshift = distribution(settings), 1 / flow_shift(settings, size)
    limits = (settings.min_timestep - offset, settings.max_timestep - offset)
    low, high = (shift_timestep(min(max(limit / 1000, 0.0), 1.0), unshift) for limit in limits)
    return drawn.share_below(low), drawn.share_below(high)


def draw_timestep(
    key: SampleKey, seed: int, settings: TimestepSettings, size: tuple[int, int], offset: int = 0
) -> float:
    """One use of one picture's t. offset: added to it, in thousandths."""
    return timestep_at(python_random(seed, "timestep", *key).random(), settings, size, offset)


def timestep_at(share: float, settings: TimestepSettings, size: tuple[int, int], offset: int = 0) -> float:
    """The t that a share of all draws, between 0 and 1, lies below."""
    low, high = allowed_shares(settings, size, offset)
    share = low + (high - low) * share
    share = min(max(share, 2**-53), 1 - 2**-53)  # 0 and 1 themselves would be infinite logits
    return shift_timestep(distribution(settings).quantile(share), flow_shift(settings, size)) + offset / 1000


def draw_timesteps(
    keys: Sequence[SampleKey], seed: int, settings: TimestepSettings, size: tuple[int, int], offsets: Sequence[int]
) -> torch.Tensor:
    """A t for each sample of a batch of pictures of one (width, height), on the CPU: float32 [B]."""
    drawn = [draw_timestep(key, seed, settings, size, offset) for key, offset in zip(keys, offsets, strict=True)]
    return torch.tensor(drawn, dtype=torch.float32)


def timestep_problems(settings: TimestepSettings) -> Iterator[tuple[str, str]]:
    """Settings that contradict each other, as (name, what is wrong and what to do)."""
    kohya, anima = settings.timestep_sampling, settings.anima_timestep_sampling
    if kohya is not None and anima is not None and base_sampling(settings) != anima:
        yield "anima_timestep_sampling", f"{anima} contradicts timestep_sampling {kohya}; keep one of them"
    shift = settings.anima_flow_shift
    if shift is not None and kohya in _UNSHIFTED and shift != 1:
        other = "shift" if kohya == "sigmoid" else "sigma"
        yield (
            "anima_flow_shift",
            f"{shift:g} contradicts timestep_sampling {kohya}, which has no shift: "
            f"remove one of them, or set timestep_sampling = {other}",
        )
    if shift is not None and kohya == "flux_shift":
        yield (
            "anima_flow_shift",
            f"{shift:g} contradicts timestep_sampling flux_shift, which takes the shift from the picture's size: "
            "remove one of them, or set timestep_sampling = shift",
        )


def lacks_timesteps(settings: TimestepSettings, offset: int = 0) -> bool:
    """Whether (almost) no t can be drawn within the limits, for a picture of 1024 x 1024 pixels."""
    low, high = allowed_shares(settings, (1024, 1024), offset)
    return high - low < _LEAST_SHARE
