"""Rules of the training objective: which of its settings contradict each other, and which do nothing."""

from __future__ import annotations

from collections.abc import Iterator

from library.anima_runtime.objective.timesteps import base_sampling, lacks_timesteps, timestep_problems
from library.settings.groups import Settings


def objective_problems(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Contradictions, as (prefix of a subset or "", name of the setting, what is wrong and what to do)."""
    timesteps = settings.timesteps
    problems = list(timestep_problems(timesteps))
    limits = f"min_timestep {timesteps.min_timestep} to max_timestep {timesteps.max_timestep}"
    if timesteps.min_timestep >= timesteps.max_timestep:
        problems.append(("min_timestep", f"{limits} leaves no timesteps: min_timestep must be below max_timestep"))
    elif not problems and lacks_timesteps(timesteps):
        problems.append(("min_timestep", f"(almost) no timesteps are drawn in {limits}: widen them"))
    for name, problem in problems:
        yield "", name, problem
    if problems:
        return
    for i, dataset in enumerate(settings.datasets):
        for j, subset in enumerate(dataset.subsets):
            if lacks_timesteps(timesteps, subset.timestep_offset):
                offset = f"{subset.timestep_offset} moves (almost) all timesteps out of {limits}"
                yield f"datasets[{i}].subsets[{j}].", "timestep_offset", f"{offset}: bring it nearer to 0"


def objective_without_effect(settings: Settings) -> Iterator[tuple[str, str]]:
    """Settings that do nothing beside the others, as (name, why)."""
    timesteps, noise, loss = settings.timesteps, settings.noise, settings.loss
    base, scheme = base_sampling(timesteps), timesteps.weighting_scheme
    if base != "logit_normal":
        yield "anima_sigmoid_scale", f"it is for logit_normal, and timesteps are drawn by {base}"
    if base != "sigma" and scheme in ("logit_normal", "mode"):
        yield "weighting_scheme", f"{scheme} is for timestep_sampling sigma; anima_timestep_sampling says it here"
    if base != "sigma" or scheme != "logit_normal":
        for name in ("logit_mean", "logit_std"):
            yield name, "it is for timestep_sampling sigma with weighting_scheme logit_normal"
    if base != "sigma" or scheme != "mode":
        yield "mode_scale", "it is for timestep_sampling sigma with weighting_scheme mode"
    if not noise.anima_noise_offset:
        yield "noise_offset_random_strength", "anima_noise_offset is 0"
    if not noise.multires_noise_iterations:
        yield "multires_noise_discount", "multires_noise_iterations is 0"
    if not noise.ip_noise_gamma:
        yield "ip_noise_gamma_random_strength", "ip_noise_gamma is 0"
    if loss.loss_type not in ("huber", "smooth_l1"):
        for name in ("huber_schedule", "huber_c", "huber_scale"):
            yield name, f"it is for loss_type huber and smooth_l1, and loss_type is {loss.loss_type}"
