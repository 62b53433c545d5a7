"""Each option of the objective, in the first step of a run: what it changes, and that it changes nothing else."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from safetensors import safe_open

from anima_train_network import AnimaNetworkTrainer, main
from library.anima_runtime.objective.step_inputs import TrainingInputs

FIELDS = {"noisy_BCTHW", "timesteps_B", "target_BCTHW", "weights_B"}


class FirstStep(NamedTuple):
    inputs: TrainingInputs
    losses: torch.Tensor


@pytest.fixture
def first_step(config, monkeypatch):
    """first_step(loss_type="l1") -> what the first batch of a run became."""

    def run(**settings) -> FirstStep:
        seen = []
        losses = AnimaNetworkTrainer.losses

        def recorded(self, inputs):
            result = losses(self, inputs)
            seen.append(FirstStep(type(inputs)(*(tensor.clone() for tensor in inputs)), result.detach().clone()))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(AnimaNetworkTrainer, "losses", recorded)
            assert main(config(max_train_steps=1, log_with="none", **settings)) == 0
        return seen[0]

    return run


def changed(step: FirstStep, plain: FirstStep) -> set[str]:
    """The inputs that differ."""
    return {name for name in FIELDS if not torch.equal(getattr(step.inputs, name), getattr(plain.inputs, name))}


TIMES = {"timesteps_B", "noisy_BCTHW"}
NOISE = {"target_BCTHW", "noisy_BCTHW"}
OPTIONS = [
    ({"anima_timestep_sampling": "uniform"}, TIMES),
    ({"anima_flow_shift": 1}, TIMES),
    ({"anima_sigmoid_scale": 1.3}, TIMES),
    ({"timestep_sampling": "sigmoid"}, TIMES),
    ({"timestep_sampling": "uniform"}, TIMES),
    ({"timestep_sampling": "shift", "discrete_flow_shift": 2}, TIMES),
    ({"timestep_sampling": "flux_shift"}, TIMES),
    ({"timestep_sampling": "sigma", "weighting_scheme": "mode"}, TIMES),
    ({"timestep_sampling": "sigma", "weighting_scheme": "logit_normal", "logit_mean": 0.5}, TIMES),
    ({"min_timestep": 400}, TIMES),
    ({"max_timestep": 600}, TIMES),
    ({"timestep_offset": -100}, TIMES),
    ({"weighting_scheme": "cosmap"}, {"weights_B"}),
    ({"weighting_scheme": "sigma_sqrt"}, {"weights_B"}),
    ({"noise_offset": 0.1}, NOISE),
    ({"multires_noise_iterations": 6}, NOISE),
    ({"ip_noise_gamma": 0.1}, {"noisy_BCTHW"}),
    ({"loss_type": "l1"}, set()),
    ({"loss_type": "huber"}, set()),
    ({"loss_type": "smooth_l1", "huber_schedule": "exponential"}, set()),
]


def test_each_option_changes_what_it_says_and_with_it_the_loss(first_step):
    plain = first_step()
    assert plain.inputs.weights_B.tolist() == [1.0] * 4
    for settings, fields in OPTIONS:
        step = first_step(**settings)
        assert changed(step, plain) == fields, settings
        assert not torch.equal(step.losses, plain.losses), settings


def test_both_vocabularies_and_neutral_values_give_the_same_step(first_step):
    plain = first_step()
    neutral = {"multires_noise_discount": 0.5, "huber_c": 0.3, "ip_noise_gamma": 0, "min_timestep": 0}
    for settings in ({"timestep_sampling": "shift"}, {"anima_flow_shift": 3}, {"weighting_scheme": "uniform"}, neutral):
        step = first_step(**settings)
        assert changed(step, plain) == set()
        assert torch.equal(step.losses, plain.losses)
    unshifted = first_step(timestep_sampling="sigmoid", sigmoid_scale=1.2)
    assert changed(first_step(anima_flow_shift=1, anima_sigmoid_scale=1.2), unshifted) == set()


def test_input_and_target_fit_each_other_whatever_the_noise(first_step):
    """x_t - t v = x_0: the cached latents, the same under every noise option; ip_noise_gamma adds t γ ζ to them."""

    def picture(step):
        t = step.inputs.timesteps_B.view(-1, 1, 1, 1, 1)
        return step.inputs.noisy_BCTHW - t * step.inputs.target_BCTHW

    plain = first_step()
    for settings in ({"noise_offset": 0.2}, {"multires_noise_iterations": 4}, {"timestep_sampling": "uniform"}):
        torch.testing.assert_close(picture(first_step(**settings)), picture(plain), rtol=0, atol=1e-5)
    perturbed = picture(first_step(ip_noise_gamma=0.1)) - picture(plain)
    shares = perturbed.flatten(1).std(dim=1) / plain.inputs.timesteps_B
    assert shares.tolist() == pytest.approx([0.1] * 4, rel=0.15)


def test_weights_and_losses_equal_plain_maths(first_step):
    plain = first_step()
    t = plain.inputs.timesteps_B
    for scheme in ("cosmap", "sigma_sqrt"):
        expected = plain.losses * compute_loss_weighting_for_sd3(scheme, t)
        torch.testing.assert_close(first_step(weighting_scheme=scheme).losses, expected, rtol=1e-5, atol=0)
    # with a threshold far above every error huber is l2, far below it smooth_l1 is twice l1
    huber = first_step(loss_type="huber", huber_schedule="constant", huber_c=1000)
    torch.testing.assert_close(huber.losses, plain.losses, rtol=1e-3, atol=0)
    smooth = first_step(loss_type="smooth_l1", huber_c=1, huber_scale=1e-6)
    torch.testing.assert_close(smooth.losses, 2 * first_step(loss_type="l1").losses, rtol=1e-3, atol=0)


def test_limits_hold_in_a_run(first_step):
    t = first_step(min_timestep=300, max_timestep=400, timestep_offset=50).inputs.timesteps_B
    assert t.min() >= 0.3 - 1e-6 and t.max() <= 0.4 + 1e-6


def test_the_weight_of_a_sample_multiplies_its_loss(first_step, monkeypatch):
    plain = first_step()
    prepare = AnimaNetworkTrainer.prepare

    def weighted(self, batch):
        batch.loss_weights.copy_(torch.tensor([1.0, 0.5, 0.0, 2.0]))
        return prepare(self, batch)

    monkeypatch.setattr(AnimaNetworkTrainer, "prepare", weighted)
    expected = plain.losses * torch.tensor([1.0, 0.5, 0.0, 2.0])
    torch.testing.assert_close(first_step().losses, expected, rtol=1e-6, atol=0)


def test_the_metadata_tells_the_objective_as_it_acted(first_step, tmp_path):
    def told(**settings) -> dict[str, str]:
        first_step(**settings)
        with safe_open(tmp_path / "output" / "tiny.safetensors", "pt") as file:
            return file.metadata()

    plain = told()
    assert (plain["ss_timestep_sampling"], plain["ss_discrete_flow_shift"]) == ("logit_normal", "3.0")
    assert (plain["ss_loss_type"], plain["ss_noise_offset"]) == ("l2", "0.0")
    other = told(timestep_sampling="sigmoid", sigmoid_scale=1.2, noise_offset=0.05, loss_type="huber", max_timestep=900)
    expected = {
        "timestep_sampling": "sigmoid", "discrete_flow_shift": "1.0", "sigmoid_scale": "1.2", "noise_offset": "0.05",
        "loss_type": "huber", "huber_schedule": "snr", "huber_c": "0.1", "max_timestep": "900",
    }  # fmt: skip
    assert {name: other[f"ss_{name}"] for name in expected} == expected
    assert told(timestep_sampling="flux_shift")["ss_discrete_flow_shift"] == "None"


def test_showing_timesteps_draws_those_of_the_run_and_trains_nothing(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(AnimaNetworkTrainer, "load_models", lambda self: pytest.fail("a model was loaded"))
    path = tmp_path / "pictures" / "t.png"
    assert main(config(max_train_epochs=2, show_timesteps=path, timestep_sampling="flux_shift")) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    # 4 pictures, 10 repeats, 2 epochs
    assert "Timesteps of 80 samples, 0.5" in capsys.readouterr().err
    assert not (tmp_path / "output" / "tiny.safetensors").exists()
    assert main(config(show_timesteps=tmp_path / "t.txtt")) == 1
    assert "the picture cannot be written" in capsys.readouterr().err
