"""LoRA for Anima: the two functions a trainer of Kohya's kind calls on a network module."""

from __future__ import annotations

from networks.creation import create_network_from_weights, entry_point

__all__ = ["create_network", "create_network_from_weights"]

create_network = entry_point("lora")
