"""Optimizers: made from settings, checked before a run, and what is special about some."""

import io
import math

import pytest
import torch

from library.errors import SettingError
from library.training.optimization.optimizer_names import OPTIMIZER_NAMES, find_optimizer
from library.training.optimization.optimizers import (
    OptimizerSettings,
    averaged_weights,
    check_optimizer,
    make_optimizer,
    optimizer_arguments,
    rates_before_step,
    rates_of_step,
)

CPU = torch.device("cpu")
# Rates and arguments with which 40 steps show that an optimizer learns; the others do at 0.05 or, finding it, at 1.
RATES = {
    **dict.fromkeys(("SGDNesterov", "SGDNesterov8bit", "DAdaptation", "DAdaptAdamPreprint"), 0.3),
    "RAdamScheduleFree": 1.0,
    "SGDScheduleFree": 2.0,
}
STARTS = {"DAdaptAdaGrad": "d0=1e-2", "ProdigyPlusScheduleFree": "d0=1e-2"}


def groups():
    return [{"name": "all", "params": [torch.nn.Parameter(torch.ones(3))]}]


@pytest.mark.parametrize("name", ["AdamW", "adamw", "ADAMW"])
def test_names_do_not_depend_on_case(name):
    optimizer = make_optimizer(OptimizerSettings(optimizer_type=name, learning_rate=3e-4), groups(), CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 3e-4


def test_arguments_are_typed():
    settings = OptimizerSettings(optimizer_args=("betas=0.9,0.99", "weight_decay=0.05", "amsgrad=True", "eps=1e-6"))
    optimizer = make_optimizer(settings, groups(), CPU)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["amsgrad"], group["eps"]) == ((0.9, 0.99), 0.05, True, 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (OptimizerSettings(optimizer_args=("betas",)), "'betas' is not of the form key=value"),
        (OptimizerSettings(optimizer_args=("beta=0.9",)), "AdamW takes no 'beta'; it takes betas"),
        (OptimizerSettings(optimizer_args=("lr=1",)), "the rate is learning_rate"),
    ],
)
def test_what_cannot_be_used_is_named(settings, message):
    with pytest.raises(SettingError) as error:
        optimizer_arguments(settings)
    assert message in str(error.value)


@pytest.mark.parametrize("argument", ["weight_decay=a lot", "betas=0.9", "eps=-1", "fused=yes"])
def test_values_an_optimizer_cannot_use_are_told_with_the_argument(argument):
    with pytest.raises(SettingError, match=f"optimizer_args: AdamW cannot use {argument}"):
        check_optimizer(OptimizerSettings(optimizer_args=(argument, "foreach=true")))


def test_what_a_package_would_swallow_is_refused():
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(SettingError, match="CAME takes no 'scale_parameter'"):
        check_optimizer(OptimizerSettings(optimizer_type="CAME", optimizer_args=("scale_parameter=False",)))


def test_an_optimizer_that_a_step_finds_unfit_is_refused_before_the_run():
    with pytest.raises(SettingError, match=r"optimizer_type: torch.optim.LBFGS cannot be used: .*closure"):
        check_optimizer(OptimizerSettings(optimizer_type="torch.optim.LBFGS"))


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam"])
def test_one_rate_for_all_is_demanded_where_the_optimizer_has_but_one(name):
    made_or_skip(name)
    settings = OptimizerSettings(optimizer_type=name, learning_rate=1)
    check_optimizer(settings, {"transformer": 1.0, "llm_adapter": 1.0})
    with pytest.raises(SettingError, match=rf"{name} cannot use different rates \(transformer 1, llm_adapter 0.5\)"):
        check_optimizer(settings, {"transformer": 1.0, "llm_adapter": 0.5})
    check_optimizer(OptimizerSettings(), {"transformer": 1.0, "llm_adapter": 0.5})


def made_or_skip(name, parameters=None, rate=0.05, arguments=()):
    """The optimizer in two groups; skips where its package is not installed."""
    try:
        find_optimizer(name)
    except SettingError as error:
        pytest.skip(str(error))
    settings = OptimizerSettings(optimizer_type=name, learning_rate=rate, optimizer_args=arguments)
    first, *rest = parameters or [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    parts = [{"name": "first", "lr": rate, "params": [first]}, {"name": "rest", "lr": rate, "params": rest}]
    return make_optimizer(settings, parts, CPU)


def quadratic(parameters):
    """Half the squared distance from 0.3; LoRA's shapes, large enough for 8-bit states (from 4096 numbers)."""
    return sum(((parameter - 0.3) ** 2).sum() for parameter in parameters) / 2


def new_parameters():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 64), (4, 64), (64,))]


def train(optimizer, parameters, steps):
    for _ in range(steps):
        quadratic(parameters).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_each_learns_and_goes_on_from_its_state_bit_for_bit(name):
    rate = RATES.get(name, 1.0 if name.startswith(("Prodigy", "DAdapt")) else 0.05)
    arguments = (STARTS[name],) if name in STARTS else ()
    parameters = new_parameters()
    optimizer = made_or_skip(name, parameters, rate, arguments)
    before = quadratic(parameters).item()
    train(optimizer, parameters, 20)
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)
    state.seek(0)
    again = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = made_or_skip(name, again, rate, arguments)
    resumed.load_state_dict(torch.load(state, map_location="cpu", weights_only=True))
    train(optimizer, parameters, 20)
    train(resumed, again, 20)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))
    with averaged_weights(optimizer):
        after = quadratic(parameters).item()
    assert after < 0.5 * before


def test_averaged_weights_are_the_mean_of_the_points_that_sgd_visits():
    """Without momentum and weighting, schedule-free SGD averages the iterates z (arXiv 2405.15682, equation 2)."""
    pytest.importorskip("schedulefree")
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    settings = OptimizerSettings(
        optimizer_type="SGDScheduleFree",
        learning_rate=0.1,
        optimizer_args=("momentum=0.5", "weight_lr_power=0", "foreach=False"),
    )
    optimizer = make_optimizer(settings, [{"name": "all", "params": [parameter]}], CPU)
    visited, z, x = [], 1.0, 1.0
    for k in range(1, 6):
        y = 0.5 * z + 0.5 * x
        assert parameter.item() == pytest.approx(y, abs=1e-6)
        z -= 0.1 * y  # the gradient of y²/2
        visited.append(z)
        x = sum(visited) / k
        (parameter**2 / 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        trained = parameter.detach().clone()
        with averaged_weights(optimizer):
            assert parameter.item() == pytest.approx(x, abs=1e-6)
            with averaged_weights(optimizer):
                assert parameter.item() == pytest.approx(x, abs=1e-6)
        assert torch.equal(parameter, trained)


def test_weights_come_back_after_an_error():
    pytest.importorskip("schedulefree")
    parameters = new_parameters()
    optimizer = made_or_skip("AdamWScheduleFree", parameters)
    train(optimizer, parameters, 3)
    trained = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(RuntimeError, match="out of ideas"), averaged_weights(optimizer):
        assert not torch.equal(parameters[0], trained[0])
        raise RuntimeError("out of ideas")
    assert all(torch.equal(a, b) for a, b in zip(parameters, trained, strict=True))
    train(optimizer, parameters, 1)


def test_rates_of_the_curves():
    optimizer = made_or_skip("AdamW")
    optimizer.param_groups[1]["lr"] = 0.02
    before = rates_before_step(optimizer, factor=0.5)
    optimizer.param_groups[1]["lr"] = 0.3  # as the schedule does for the next step
    assert rates_of_step(optimizer, before) == {"lr/first": 0.025, "lr/rest": 0.01}


def test_the_rate_that_prodigy_finds_is_on_a_curve():
    parameters = new_parameters()
    optimizer = made_or_skip("Prodigy", parameters, 0.5)
    seen = []
    for _ in range(5):
        before = rates_before_step(optimizer, factor=1.0)
        train(optimizer, parameters, 1)
        seen.append(rates_of_step(optimizer, before))
    assert all(rates["lr/first"] == 0.5 and rates["lr/d*lr/first"] == rates["lr/d*lr/rest"] for rates in seen)
    found = [rates["lr/d*lr/first"] for rates in seen]
    assert found[0] == pytest.approx(0.5e-6)  # the first step goes by d0, which is 1e-6
    assert found[0] < found[-1] < 0.5 * optimizer.param_groups[0]["d"]


def test_nothing_is_read_from_the_device_before_a_step():
    """The "meta" device stands for a card: nothing can be read from it."""
    optimizer = made_or_skip("Prodigy", rate=0.5)
    for group in optimizer.param_groups:
        group["d"] = torch.ones((), device="meta")
    assert rates_before_step(optimizer, factor=0.5)["lr/d*lr/first"].is_meta


def test_adafactor_uses_learning_rate_only_without_relative_step():
    """Adafactor's own rate: max(0.001, RMS of the weights) times 1 / sqrt(step), at most 1 % (arXiv 1804.04235)."""
    parameters = [torch.nn.Parameter(torch.full((2, 2), 2.0)), torch.nn.Parameter(torch.ones(2))]
    optimizer = made_or_skip("AdaFactor", parameters, rate=123.0)
    before = rates_before_step(optimizer, factor=1.0)
    assert rates_of_step(optimizer, before) == {"lr/first": 0.0, "lr/rest": 0.0}
    train(optimizer, parameters, 1)
    assert rates_of_step(optimizer, before) == pytest.approx({"lr/first": 0.02, "lr/rest": 0.01})
    assert parameters[0].detach().flatten().tolist() == pytest.approx([1.98] * 4, abs=1e-4)

    parameters = [torch.nn.Parameter(torch.full((2, 2), 2.0)), torch.nn.Parameter(torch.ones(2))]
    optimizer = made_or_skip("AdaFactor", parameters, 0.25, ("relative_step=False", "scale_parameter=False"))
    before = rates_before_step(optimizer, factor=1.0)
    train(optimizer, parameters, 1)
    assert rates_of_step(optimizer, before) == {"lr/first": 0.25, "lr/rest": 0.25}
    assert parameters[0].detach().flatten().tolist() == pytest.approx([1.75] * 4, abs=1e-4)


def test_nesterov_is_what_its_name_says():
    """v = m·v + g, and the step is g + m·v (Sutskever et al. 2013, as torch documents it)."""
    parameters = [torch.nn.Parameter(torch.tensor([2.0])), torch.nn.Parameter(torch.tensor([1.0]))]
    optimizer = made_or_skip("SGDNesterov", parameters, rate=0.1)
    x, v = 2.0, 0.0
    for _ in range(3):
        v = 0.9 * v + (x - 0.3)
        x -= 0.1 * ((x - 0.3) + 0.9 * v)
    train(optimizer, parameters, 3)
    assert math.isclose(parameters[0].item(), x, rel_tol=1e-6)
