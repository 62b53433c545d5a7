"""Optimizers by name, with typed arguments."""

import pytest
import torch

from library.errors import SettingError
from library.training.optimizers import (
    OptimizerSettings,
    check_optimizer,
    make_optimizer,
    optimizer_arguments,
)

CPU = torch.device("cpu")


def groups():
    return [{"name": "all", "params": [torch.nn.Parameter(torch.ones(3))]}]


@pytest.mark.parametrize("name", ["AdamW", "adamw", "ADAMW"])
def test_names_do_not_depend_on_case(name):
    optimizer = make_optimizer(OptimizerSettings(optimizer_type=name, learning_rate=3e-4), groups(), CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 3e-4


def test_arguments_are_typed():
    settings = OptimizerSettings(optimizer_args=("betas=(0.9, 0.99)", "weight_decay=0.05", "amsgrad=True", "eps=1e-6"))
    optimizer = make_optimizer(settings, groups(), CPU)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["amsgrad"], group["eps"]) == ((0.9, 0.99), 0.05, True, 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (OptimizerSettings(optimizer_type="Adamm"), "optimizer_type: 'Adamm' is not known"),
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


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(SettingError, match="pip install bitsandbytes"):
        optimizer_arguments(OptimizerSettings(optimizer_type="AdamW8bit"))
