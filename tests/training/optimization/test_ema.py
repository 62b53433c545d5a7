"""The average of an adapter, against a hand computation."""

import pytest
import torch
from torch import nn

from library.errors import SettingError
from library.training.optimization.ema import AdapterEma, EmaSettings, check_ema, decay_after
from library.training.optimization.optimizers import OptimizerSettings, make_optimizer

YES, NO = torch.tensor(True), torch.tensor(False)


def network_at(value: float) -> nn.Module:
    network = nn.Linear(2, 2)
    set_to(network, value)
    return network


def set_to(network: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)


def average(ema: AdapterEma) -> float:
    (value,) = {number for tensor in ema.state_dict()["average"].values() for number in tensor.flatten().tolist()}
    return value


@pytest.mark.parametrize("device", ["same", "cpu"])
def test_the_average_follows_the_weights(device):
    network = network_at(1.0)
    ema = AdapterEma(EmaSettings(ema_decay=0.5, ema_device=device), network)
    expected = None
    for number, value in enumerate((1.0, 2.0, -3.0, 8.0, 4.0, 0.0), start=1):
        set_to(network, value)
        ema.update(YES)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert average(ema) == pytest.approx(expected, rel=1e-6)


def test_a_step_left_out_changes_nothing():
    network = network_at(1.0)
    ema = AdapterEma(EmaSettings(ema_decay=0.9), network)
    ema.update(YES)
    set_to(network, 2.0)
    ema.update(YES)
    before = average(ema)
    ema.update(NO)
    assert average(ema) == before != 2.0


@pytest.mark.parametrize(
    ("updates", "power", "decay"),
    [(1, None, 2 / 11), (90, None, 0.91), (5000, None, 0.99), (7, 2 / 3, 1 - 8 ** (-2 / 3)), (5000, 1.0, 0.99)],
)
def test_the_decay_rises_to_its_value(updates, power, decay):
    assert decay_after(updates, EmaSettings(ema_decay=0.99, ema_power=power)) == pytest.approx(decay)


def test_applied_weights_are_the_average_and_come_back_bit_for_bit():
    network = network_at(1.0)
    ema = AdapterEma(EmaSettings(ema_decay=0.5), network)
    ema.update(YES)
    set_to(network, 1 / 3)
    ema.update(YES)
    with ema.applied():
        assert network.weight[0, 0].item() == average(ema) == pytest.approx(1 / 4 + 3 / 4 / 3)
    assert network.weight[0, 0].item() == torch.tensor(1 / 3).item()


def test_before_the_first_step_the_average_is_the_adapter():
    network = network_at(3.0)
    with AdapterEma(EmaSettings(ema_decay=0.5), network).applied():
        assert network.weight[0, 0].item() == 3.0


def test_a_saved_average_goes_on_as_if_it_had_not_been():
    network = network_at(1.0)
    straight, first = (AdapterEma(EmaSettings(ema_decay=0.9), network) for _ in range(2))
    for ema in (straight, first):
        ema.update(YES)
    second = AdapterEma(EmaSettings(ema_decay=0.9), network)
    second.load_state_dict(first.state_dict())
    set_to(network, 2.0)
    for ema in (straight, second):
        ema.update(YES)
    assert average(second) == average(straight)
    assert average(first) == 1.0


def test_the_average_is_kept_where_it_shall_be():
    """On the "meta" device, which stands for a card: nothing can be read from it."""
    network = nn.Linear(2, 2, device="meta")
    same, cpu = (AdapterEma(EmaSettings(ema_decay=0.5, ema_device=device), network) for device in ("same", "cpu"))
    same.update(YES.to("meta"))
    assert {tensor.device.type for tensor in same.state_dict()["average"].values()} == {"meta"}
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        cpu.update(YES)
    saved = {"updates": 3, "average": {name: torch.ones(2) for name in ("weight", "bias")}}
    for ema, device in ((same, "meta"), (cpu, "cpu")):
        ema.load_state_dict(saved)
        assert {tensor.device.type for tensor in ema.state_dict()["average"].values()} == {device}


def test_frozen_weights_are_not_averaged():
    network = network_at(1.0)
    network.bias.requires_grad_(False)
    ema = AdapterEma(EmaSettings(ema_decay=0.9), network)
    ema.update(YES)
    assert list(ema.state_dict()["average"]) == ["weight"]


def test_an_optimizer_that_averages_itself_is_refused():
    group = {"name": "all", "params": [nn.Parameter(torch.ones(1))]}
    optimizer = make_optimizer(OptimizerSettings("AdamWScheduleFree"), [group], torch.device("cpu"))
    with pytest.raises(SettingError, match=r"ema_decay: AdamWScheduleFree averages the weights itself"):
        check_ema(EmaSettings(ema_decay=0.9), optimizer)
    check_ema(EmaSettings(), optimizer)
