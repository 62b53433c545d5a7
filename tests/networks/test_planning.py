"""The network of a run before a model is loaded: what is wrong is gathered, and what is not known is None."""

from __future__ import annotations

import pytest
from torch import nn

from library.errors import Problems
from networks import lora_anima
from networks.planning import parameter_groups, plan_network
from networks.settings import NetworkSettings


def planned(settings, models):
    problems = Problems()
    return plan_network(settings, (), lambda _: models, False, problems), problems.found


def test_a_network_for_known_models(model, text_encoder):
    plan, found = planned(NetworkSettings(network_dim=4), (model, text_encoder))
    assert (plan.module, found) == (lora_anima, [])
    groups = parameter_groups(NetworkSettings(unet_lr=0.5), 0.1, plan.network)
    assert {group["lr"] for group in groups} == {0.5}
    assert sum(len(group["params"]) for group in groups) == len(list(plan.network.parameters()))


@pytest.mark.parametrize(
    ("settings", "models", "messages"),
    [
        (NetworkSettings(network_module="networks.no"), (nn.Identity(), nn.Identity()), 1),
        (NetworkSettings(network_args=("network_dim=4",)), (nn.Identity(), nn.Identity()), 1),
        (NetworkSettings(network_module="networks.no", network_args=("network_dim=4",)), None, 2),
        (NetworkSettings(), None, 0),
    ],
)
def test_everything_wrong_is_told_and_no_network_is_made(settings, models, messages):
    plan, found = planned(settings, models)
    assert plan.network is None
    assert len(found) == messages
