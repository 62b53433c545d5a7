"""Optimizers that go on, are grouped otherwise, or start anew when a run is resumed."""

import pytest
import torch
from torch import nn

from library.errors import SettingError
from library.training.optimization.optimizer_states import load_optimizer, optimizer_content


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def one_group(network, cls=torch.optim.AdamW, rate=0.1, **arguments):
    return cls([{"name": "all", "lr": rate, "params": list(network.parameters())}], lr=rate, **arguments)


def trained(network, optimizer, steps=3):
    for _ in range(steps):
        network(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer_content(optimizer, network)


def state_by_name(optimizer, network):
    return {name: optimizer.state.get(parameter) for name, parameter in network.named_parameters()}


def test_the_rate_stays_the_new_one():
    network = make_network()
    saved = trained(network, one_group(network))
    optimizer = one_group(network, rate=0.02)
    assert load_optimizer(saved, optimizer, network, ignore_mismatch=False)
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert all(state["step"] == 3 for state in optimizer.state.values())


def test_another_grouping_keeps_each_parameters_state():
    network = make_network()
    first = one_group(network)
    saved = trained(network, first)
    before = state_by_name(first, network)
    layers = [list(layer.parameters()) for layer in network]
    groups = [
        {"name": name, "lr": rate, "params": own}
        for name, rate, own in zip("ba", (0.3, 0.2), layers[::-1], strict=True)
    ]
    second = torch.optim.AdamW(groups)
    assert load_optimizer(saved, second, network, ignore_mismatch=False)
    assert [(group["name"], group["lr"]) for group in second.param_groups] == [("b", 0.3), ("a", 0.2)]
    for name, state in state_by_name(second, network).items():
        assert torch.equal(state["exp_avg"], before[name]["exp_avg"])


def test_a_part_that_was_not_trained_before_begins_without_a_state():
    network = make_network()
    part = torch.optim.AdamW([{"name": "all", "lr": 0.1, "params": list(network[0].parameters())}])
    saved = trained(network, part)
    optimizer = one_group(network)
    assert load_optimizer(saved, optimizer, network, ignore_mismatch=False)
    states = state_by_name(optimizer, network)
    assert states["0.weight"]["step"] == 3 and not states["1.weight"]
    trained(network, optimizer, 1)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (lambda network: one_group(network, torch.optim.SGD, momentum=0.9), "it was torch.optim.adamw.AdamW, and is"),
        (lambda network: one_group(network, weight_decay=0.5), "weight_decay was 0.01, and is 0.5"),
    ],
)
def test_another_optimizer_starts_anew_or_is_refused(other, problem, caplog):
    network = make_network()
    saved = trained(network, one_group(network))
    weights = [parameter.clone() for parameter in network.parameters()]
    optimizer = other(network)
    with pytest.raises(SettingError, match="resume_ignore_optimizer_mismatch"):
        load_optimizer(saved, optimizer, network, ignore_mismatch=False)
    assert not load_optimizer(saved, optimizer, network, ignore_mismatch=True)
    assert "the weights are kept, and the optimizer starts anew" in caplog.text and problem in caplog.text
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))


def test_a_state_that_the_optimizer_cannot_use_leaves_it_as_it_was(monkeypatch, caplog):
    network = make_network()
    saved = trained(network, one_group(network))
    optimizer = one_group(network, rate=0.02)
    load = optimizer.load_state_dict

    def refuse_halfway(state_dict):
        load(state_dict)
        if state_dict["state"]:
            raise AttributeError("no such buffer")

    monkeypatch.setattr(optimizer, "load_state_dict", refuse_halfway)
    assert not load_optimizer(saved, optimizer, network, ignore_mismatch=True)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.02
    assert "its state cannot be used: no such buffer" in caplog.text
