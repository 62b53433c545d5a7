"""Contradictions of the objective's settings are refused by name; what does nothing is told."""

import logging

import pytest

from library.errors import SettingError
from library.settings import read_settings


@pytest.fixture
def words(needed_flags):
    return [*needed_flags, "--train_data_dir", "train"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--timestep_sampling sigmoid --discrete_flow_shift 3",
            "command line: --discrete_flow_shift: 3 contradicts timestep_sampling sigmoid, which has no shift: "
            "remove one of them, or set timestep_sampling = shift",
        ),
        (
            "--timestep_sampling uniform --anima_timestep_sampling logit_normal",
            "command line: --anima_timestep_sampling: logit_normal contradicts timestep_sampling uniform; "
            "keep one of them",
        ),
        (
            "--timestep_sampling flux_shift --anima_flow_shift 2",
            "command line: --anima_flow_shift: 2 contradicts timestep_sampling flux_shift, which takes the shift from "
            "the picture's size: remove one of them, or set timestep_sampling = shift",
        ),
        (
            "--min_timestep 600 --max_timestep 500",
            "command line: --min_timestep: min_timestep 600 to max_timestep 500 leaves no timesteps: "
            "min_timestep must be below max_timestep",
        ),
        (
            "--sigmoid_scale 0.1 --min_timestep 0 --max_timestep 100",
            "(almost) no timesteps are drawn in min_timestep 0 to max_timestep 100: widen them",
        ),
        (
            "--max_timestep 200 --timestep_offset 300 --timestep_sampling uniform",
            "command line: --timestep_offset: 300 moves (almost) all timesteps out of min_timestep 0 to "
            "max_timestep 200: bring it nearer to 0",
        ),
        (
            "--anima_flow_shift 2 --discrete_flow_shift 3",
            "--discrete_flow_shift = '3': contradicts --anima_flow_shift = 2.0",
        ),
        ("--anima_flow_shift 0", "command line: --anima_flow_shift: 0.0 is out of range; give from 0.01 to 100"),
    ],
)
def test_contradictions_are_refused(words, flags, message):
    with pytest.raises(SettingError) as caught:
        read_settings([*words, *flags.split()])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--anima_timestep_sampling uniform --sigmoid_scale 1.3", "sigmoid_scale"),
        ("--timestep_sampling sigma --sigmoid_scale 1.3", "sigmoid_scale"),
        ("--weighting_scheme logit_normal", "weighting_scheme"),
        ("--timestep_sampling sigma --logit_mean 0.5", "logit_mean"),
        ("--timestep_sampling sigma --weighting_scheme logit_normal --mode_scale 1", "mode_scale"),
        ("--noise_offset_random_strength", "noise_offset_random_strength"),
        ("--multires_noise_discount 0.2", "multires_noise_discount"),
        ("--ip_noise_gamma_random_strength", "ip_noise_gamma_random_strength"),
        ("--huber_c 0.2", "huber_c"),
        ("--loss_type l1 --huber_schedule constant", "huber_schedule"),
        ("--noise_offset_type Original", "noise_offset_type"),
    ],
)
def test_what_does_nothing_is_told(words, flags, name, caplog):
    caplog.set_level(logging.WARNING)
    read_settings([*words, *flags.split()])
    told = [record.message for record in caplog.records if "does nothing" in record.message]
    assert [text.split(" does nothing")[0] for text in told] == [f"command line: --{name}"]


@pytest.mark.parametrize(
    "flags",
    [
        "--timestep_sampling sigma --weighting_scheme logit_normal --logit_mean 0.5 --logit_std 0.8",
        "--timestep_sampling sigma --weighting_scheme mode --mode_scale 0.5 --discrete_flow_shift 1",
        "--weighting_scheme cosmap --timestep_sampling sigmoid --sigmoid_scale 1.3 --anima_flow_shift 1",
        "--noise_offset 0.1 --noise_offset_random_strength --multires_noise_iterations 6 --multires_noise_discount 0.2",
        "--loss_type huber --huber_schedule exponential --huber_c 0.2 --huber_scale 2",
        "--ip_noise_gamma 0.1 --ip_noise_gamma_random_strength --min_timestep 100 --max_timestep 900",
    ],
)
def test_what_acts_is_accepted_without_a_word(words, flags, caplog):
    caplog.set_level(logging.WARNING)
    read_settings([*words, *flags.split()])
    assert caplog.records == []
