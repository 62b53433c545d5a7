"""Which adapter is trained, how large it is, and where it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.options import option


@dataclass(frozen=True)
class NetworkSettings:
    """The adapter network."""

    network_module: str = option("networks.lora_anima", "Module that builds the adapter.")
    network_dim: int = option(4, "Rank of the adapter.")
    network_alpha: float = option(1.0, "The adapter's strength is alpha / rank; 0 means alpha = rank.")
    network_dropout: float = option(0.0, "Chance of each rank activation to be dropped in training (0 to 1).")
    network_args: tuple[str, ...] = option((), "Further arguments of the network module, each 'key=value'.")
    network_weights: Path | None = option(None, "Adapter file to start from.")
    train_llm_adapter: bool = option(True, "Train adapters on the LLM adapter's Linears as well.")
