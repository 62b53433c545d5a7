"""The network of a run, made and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from library.errors import Problems
from networks.settings import NetworkSettings
from networks.setup import Network, check_planned, import_network_module, missing_adapter_files, network_arguments


@dataclass(frozen=True)
class PlannedNetwork:
    """network: on the meta device; None where another package makes it, or where something is wrong."""

    module: ModuleType | None
    arguments: dict[str, str] | None
    network: Network | None


def plan_network(
    settings: NetworkSettings,
    given: Collection[str],
    plan_models: Callable[[Problems], tuple[nn.Module, nn.Module] | None],
    caches_text: bool,
    problems: Problems,
) -> PlannedNetwork:
    """What is wrong with the network or the models goes to `problems`.

    given: names of the settings that were set explicitly. plan_models: makes the model and its text encoder on the meta
    device, or gives None where their files do not tell.
    """
    module = problems.attempt(import_network_module, settings.network_module)
    arguments = problems.attempt(network_arguments, settings, given)
    models = plan_models(problems)
    network = None
    if None not in (module, arguments, models) and not missing_adapter_files(settings):
        network = problems.attempt(check_planned, settings, module, arguments, *models, caches_text)
    return PlannedNetwork(module, arguments, network)


def parameter_groups(settings: NetworkSettings, learning_rate: float, network: Network) -> list[dict[str, Any]]:
    """What trains, grouped by part and learning rate. learning_rate: of parts without a rate of their own."""
    return network.prepare_optimizer_params(settings.text_encoder_lr, settings.unet_lr, learning_rate)
