"""Optimizers by name."""

from __future__ import annotations

from dataclasses import dataclass

from library.options import option


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer moves the adapter, and how fast."""

    optimizer_type: str = option("AdamW", "Optimizer by name, in any case: AdamW, AdamW8bit.")
    optimizer_args: tuple[str, ...] = option((), "Arguments of the optimizer, each 'key=value'.")
    learning_rate: float = option(1e-4, "Learning rate.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 leaves them alone.")
