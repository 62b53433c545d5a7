"""Timesteps against the formulas, diffusers, and the distributions they claim to follow."""

import math

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from library.anima_runtime.objective.timesteps import (
    LogitNormal,
    Mode,
    TimestepSettings,
    Uniform,
    draw_timestep,
    draw_timesteps,
    flow_shift,
    lacks_timesteps,
    shift_timestep,
    timestep_problems,
)

COUNT = 4000
SIZE = (1024, 1024)
# The distance that 1 in 1000 samples of this count exceeds, when the distributions are equal.
KOLMOGOROV = 1.95 / math.sqrt(COUNT)


def drawn(seed=1, size=SIZE, offset=0, **settings) -> torch.Tensor:
    chosen = TimestepSettings(**settings)
    t = [draw_timestep((0, f"{number}.png", 0), seed, chosen, size, offset) for number in range(COUNT)]
    return torch.tensor(t, dtype=torch.float64)


def distance(t: torch.Tensor, cumulative) -> float:
    """The greatest distance between a sample's distribution and a claimed one."""
    claimed = cumulative(t.sort().values)
    steps = torch.arange(len(t) + 1, dtype=torch.float64) / len(t)
    return max((claimed - steps[:-1]).abs().max().item(), (steps[1:] - claimed).abs().max().item())


def normal_below(x: torch.Tensor) -> torch.Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def logit_normal_below(t, mean=0.0, std=1.0, shift=1.0):
    """Through the odds, which a shift multiplies."""
    return normal_below((torch.log(t / (1 - t)) - math.log(shift) - mean) / std)


def test_shift_of_three_moves_the_middle_to_three_quarters():
    assert [shift_timestep(t, 3.0) for t in (0.0, 0.5, 1.0)] == [0.0, 0.75, 1.0]


@pytest.mark.parametrize(
    ("settings", "std", "shift"),
    [
        ({}, 1.0, 3.0),
        ({"anima_sigmoid_scale": 1.3, "anima_flow_shift": 1.0}, 1.3, 1.0),
        ({"timestep_sampling": "sigmoid"}, 1.0, 1.0),
        ({"timestep_sampling": "sigmoid", "anima_sigmoid_scale": 0.5}, 0.5, 1.0),
        ({"timestep_sampling": "shift"}, 1.0, 3.0),
        ({"timestep_sampling": "shift", "anima_flow_shift": 2.0}, 1.0, 2.0),
        ({"timestep_sampling": "flux_shift"}, 1.0, math.exp(1.15)),
    ],
)
def test_logit_normal_timesteps_have_a_normal_logit(settings, std, shift):
    assert distance(drawn(**settings), lambda t: logit_normal_below(t, std=std, shift=shift)) < KOLMOGOROV


@pytest.mark.parametrize(
    ("settings", "shift"),
    [
        ({"anima_timestep_sampling": "uniform", "anima_flow_shift": 1.0}, 1.0),
        ({"anima_timestep_sampling": "uniform"}, 3.0),
        ({"timestep_sampling": "uniform"}, 1.0),
        ({"timestep_sampling": "sigma"}, 3.0),
        ({"timestep_sampling": "sigma", "weighting_scheme": "cosmap", "anima_flow_shift": 1.0}, 1.0),
    ],
)
def test_uniform_timesteps(settings, shift):
    assert distance(drawn(**settings), lambda t: t / (shift - (shift - 1) * t)) < KOLMOGOROV


@pytest.mark.parametrize(
    "scheme",
    [
        {"weighting_scheme": "logit_normal", "logit_mean": 0.8, "logit_std": 0.7},
        {"weighting_scheme": "mode", "mode_scale": 1.29},
        {"weighting_scheme": "mode", "mode_scale": -0.8},
        {"weighting_scheme": "none", "mode_scale": 1.29},
    ],
)
def test_weighting_schemes_draw_as_diffusers_does(scheme):
    """diffusers draws u and takes its timesteps, which fall from noise to picture, at place u."""
    t = drawn(timestep_sampling="sigma", anima_flow_shift=1.0, **scheme)
    options = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, **scheme}
    generator = torch.Generator().manual_seed(4)
    theirs = 1 - compute_density_for_timestep_sampling(batch_size=200_000, generator=generator, **options)
    ordered = theirs.double().sort().values

    def below(values):
        return torch.searchsorted(ordered, values) / len(ordered)

    assert distance(t, below) < KOLMOGOROV + 1.95 / math.sqrt(200_000)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.75])
def test_share_below_undoes_the_quantile(scale):
    for distribution in (Mode(scale), Uniform(), LogitNormal(scale, 0.4)):
        for share in (1e-6, 0.1, 0.5, 0.83, 1 - 1e-6):
            assert distribution.share_below(distribution.quantile(share)) == pytest.approx(share, abs=1e-9)
        assert (distribution.share_below(0.0), distribution.share_below(1.0)) == (0.0, 1.0)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (1024, 1024), (832, 1216), (512, 768)])
def test_flux_shift_grows_with_the_picture_as_in_diffusers(width, height):
    settings = TimestepSettings(timestep_sampling="flux_shift")
    expected = math.exp(calculate_shift(width * height // 256))
    assert flow_shift(settings, (width, height)) == pytest.approx(expected)
    t = drawn(size=(width, height), timestep_sampling="flux_shift")
    assert distance(t, lambda t: logit_normal_below(t, shift=expected)) < KOLMOGOROV


@pytest.mark.parametrize(("least", "greatest"), [(0, 300), (600, 1000), (450, 550), (990, 1000)])
@pytest.mark.parametrize("offset", [0, 80])
def test_limits_cut_the_distribution_and_pile_nothing_up(least, greatest, offset):
    t = drawn(min_timestep=least, max_timestep=greatest, offset=offset)
    low, high = least / 1000, greatest / 1000
    assert low <= t.min() and t.max() <= high
    assert ((t == low) | (t == high)).sum() == 0

    def whole(t):
        return logit_normal_below((t - offset / 1000).clamp(1e-12, 1 - 1e-12), shift=3.0)

    ends = whole(torch.tensor([low, high], dtype=torch.float64))
    assert distance(t, lambda t: (whole(t) - ends[0]) / (ends[1] - ends[0])) < KOLMOGOROV


def test_an_offset_moves_each_timestep_that_stays_within_the_limits():
    settings = TimestepSettings(timestep_sampling="uniform")
    keys = [(0, "a", 0)] * 3
    t = draw_timesteps(keys, 1, settings, SIZE, [0, 100, -250]).double()
    # of p in [0, 1], the shares [0, 0.9] and [0.25, 1] stay within
    expected = [t[0], 0.1 + 0.9 * t[0], (0.25 + 0.75 * t[0]) - 0.25]
    assert t.tolist() == pytest.approx([value.item() for value in expected], abs=1e-6)


def test_draws_follow_from_the_key_and_not_from_their_order():
    settings = TimestepSettings()
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    t = draw_timesteps(keys, 7, settings, SIZE, [0] * 4)
    assert t.dtype == torch.float32
    assert torch.equal(draw_timesteps(keys[::-1], 7, settings, SIZE, [0] * 4), t.flip(0))
    assert len({*t.tolist(), *draw_timesteps(keys, 8, settings, SIZE, [0] * 4).tolist()}) == 8


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"timestep_sampling": "uniform", "anima_timestep_sampling": "logit_normal"}, ["anima_timestep_sampling"]),
        ({"timestep_sampling": "sigma", "anima_timestep_sampling": "uniform"}, ["anima_timestep_sampling"]),
        ({"timestep_sampling": "sigmoid", "anima_timestep_sampling": "logit_normal"}, []),
        ({"timestep_sampling": "sigmoid", "anima_flow_shift": 3.0}, ["anima_flow_shift"]),
        ({"timestep_sampling": "sigmoid", "anima_flow_shift": 1.0}, []),
        ({"timestep_sampling": "shift", "anima_flow_shift": 2.0}, []),
        ({"timestep_sampling": "flux_shift", "anima_flow_shift": 1.0}, ["anima_flow_shift"]),
        ({"anima_timestep_sampling": "uniform", "anima_flow_shift": 2.0}, []),
        ({}, []),
    ],
)
def test_contradictions_are_told(settings, names):
    problems = list(timestep_problems(TimestepSettings(**settings)))
    assert [name for name, _ in problems] == names
    assert all(f"timestep_sampling {settings['timestep_sampling']}" in problem for _, problem in problems)


def test_limits_that_almost_nothing_falls_into_are_known():
    assert lacks_timesteps(TimestepSettings(anima_sigmoid_scale=0.1, min_timestep=0, max_timestep=300))
    assert lacks_timesteps(TimestepSettings(timestep_sampling="uniform", max_timestep=200), offset=300)
    assert not lacks_timesteps(TimestepSettings(timestep_sampling="uniform", min_timestep=999))
    t = drawn(anima_sigmoid_scale=1000.0)  # logits beyond what exp can hold
    assert t.min() >= 0 and t.max() <= 1
