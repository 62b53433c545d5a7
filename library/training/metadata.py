"""What an adapter file says about how it was made: Kohya's ss_* keys, all strings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# ss_<name> holds the setting of the same name unless a second name is given.
_FROM_SETTINGS = {
    "network_module": "network_module",
    "network_dim": "network_dim",
    "network_alpha": "network_alpha",
    "network_dropout": "network_dropout",
    "learning_rate": "learning_rate",
    "optimizer": "optimizer_type",
    "optimizer_args": "optimizer_args",
    "lr_scheduler": "lr_scheduler",
    "lr_warmup_steps": "lr_warmup_steps",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "max_grad_norm": "max_grad_norm",
    "mixed_precision": "mixed_precision",
    "cache_latents": "cache_latents",
    "seed": "seed",
    "output_name": "output_name",
    "training_comment": "training_comment",
}


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run beside its settings. Times are seconds since 1970; datasets is JSON-ready.

    model: what the metadata says of the model and its objective, by names without "ss_".
    """

    model: Mapping[str, Any]
    num_train_images: int
    num_batches_per_epoch: int
    num_epochs: int
    max_train_steps: int
    started_at: float
    network_args: Mapping[str, str]
    datasets: list[dict[str, Any]]
    tag_frequency: Mapping[str, Mapping[str, int]]


def adapter_metadata(
    settings: Mapping[str, Any], facts: RunFacts, step: int, epoch: int, finished_at: float
) -> dict[str, str]:
    """Metadata of an adapter saved after `step` optimizer steps, in or after `epoch` (counted from 1)."""
    values: dict[str, Any] = {name: settings[setting] for name, setting in _FROM_SETTINGS.items()}
    values |= {
        **facts.model,
        "num_train_images": facts.num_train_images,
        "num_batches_per_epoch": facts.num_batches_per_epoch,
        "num_epochs": facts.num_epochs,
        "max_train_steps": facts.max_train_steps,
        "steps": step,
        "epoch": epoch,
        "training_started_at": facts.started_at,
        "training_finished_at": finished_at,
        "network_args": json.dumps(dict(facts.network_args)),
        "datasets": json.dumps(facts.datasets),
        "tag_frequency": json.dumps(facts.tag_frequency),
        "resolution": json.dumps([dataset["resolution"] for dataset in facts.datasets]),
    }
    return {f"ss_{name}": str(value) for name, value in values.items()}
