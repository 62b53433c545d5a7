"""From an optimizer's name to its class."""

import re
import sys
from pathlib import Path

import pytest
import torch

from library.errors import SettingError
from library.training.optimization.optimizer_names import _NAMED, OPTIMIZER_NAMES, find_optimizer
from library.training.optimization.schedules import SCHEDULES

REQUIRED = ("torch", "transformers")


@pytest.mark.parametrize(
    ("name", "module", "cls"),
    [
        ("radam_schedulefree", "schedulefree", "RAdamScheduleFree"),
        ("adamw8bit", "bitsandbytes", "AdamW8bit"),
        ("AdamW_8bit", "bitsandbytes", "AdamW8bit"),
        ("prodigy", "prodigyopt", "Prodigy"),
        ("Prodigy-Plus-Schedule-Free", "prodigyplus", "ProdigyPlusScheduleFree"),
        ("dadaptation", "dadaptation", "DAdaptAdamPreprint"),
        ("dadaptadanip", "dadaptation", "DAdaptAdanIP"),
        ("lion", "pytorch_optimizer", "Lion"),
        ("adafactor", "transformers", "Adafactor"),
        ("nadam", "torch", "NAdam"),
        ("torch.optim.RMSprop", "torch", "RMSprop"),
        ("pytorch_optimizer.AdEMAMix", "pytorch_optimizer", "AdEMAMix"),
    ],
)
def test_names_and_paths(name, module, cls):
    pytest.importorskip(module)
    found, implied = find_optimizer(name)
    assert found.__name__ == cls
    assert found.__module__.startswith(module)
    assert not implied


def test_nesterov_implies_its_arguments():
    assert find_optimizer("sgdnesterov") == (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Adamm", "optimizer_type: 'Adamm' is not known; did you mean AdamW"),
        ("Optimizer", "'Optimizer' is not known"),
        ("torch.optim.AdamX", "torch.optim has no optimizer class AdamX"),
        ("torch.nn.Linear", "torch.nn has no optimizer class Linear"),
        ("no_such_package.Fast", "pip install no_such_package"),
        (".AdamW", "optimizer_type: .AdamW"),
    ],
)
def test_what_is_not_found_is_told(name, message):
    with pytest.raises(SettingError) as error:
        find_optimizer(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("AdamW8bit", "bitsandbytes.optim", "bitsandbytes"),
        ("ProdigyPlusScheduleFree", "prodigyplus", "prodigy-plus-schedule-free"),
        ("prodigyplus.ProdigyPlusScheduleFree", "prodigyplus", "prodigy-plus-schedule-free"),
        ("CAME", "pytorch_optimizer", "pytorch-optimizer"),
    ],
)
def test_a_missing_package_is_named_with_its_install_command(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingError, match=f"optimizer_type: {name} needs a package .*pip install {package}$"):
        find_optimizer(name)


def test_every_name_is_found_where_its_package_is_installed():
    for name in OPTIMIZER_NAMES:
        try:
            found, _ = find_optimizer(name)
        except SettingError as error:
            assert "pip install" in str(error)
        else:
            assert issubclass(found, torch.optim.Optimizer)


def test_the_page_lists_every_optimizer_with_its_package_and_every_schedule():
    page = (Path(__file__).parents[3] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:-1] for row in page.splitlines() if row.startswith("| `")]
    listed = {name: package.strip(" `") for names, package, _ in rows for name in re.findall(r"`(\w+)`", names)}
    expected = {name: "–" if named.package in REQUIRED else named.package for name, named in _NAMED.items()}
    assert {name: listed.pop(name) for name in expected} == expected
    assert set(listed) == {*SCHEDULES, "optimizer_type", "lr_scheduler"}  # and the tables' headings
