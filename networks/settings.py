"""Which adapter is trained, how large it is, where it starts, and as what it is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.options import option
from networks.key_formats import FORMATS


def parse_formats(value: Any) -> tuple[str, ...]:
    """A format or a list of them -> formats without repeats; ValueError names the known ones."""
    formats = value if isinstance(value, list | tuple) else [value]
    if not formats or any(name not in FORMATS for name in formats):
        raise ValueError(f"expected one or more of {', '.join(FORMATS)}")
    return tuple(dict.fromkeys(formats))


def parse_multipliers(value: Any) -> tuple[float, ...]:
    """A number or a list of them; ValueError for anything else."""
    try:
        return tuple(float(item) for item in (value if isinstance(value, list | tuple) else [value]))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("expected a number for each file of base_weights") from error


@dataclass(frozen=True)
class NetworkSettings:
    """The adapter network."""

    network_module: str = option(
        "networks.lora_anima",
        "Module that builds the adapter: networks.lora_anima, networks.lokr_anima, networks.loha_anima, or another "
        "with Kohya's create_network.",
    )
    network_dim: int = option(
        4,
        "Rank: how much the adapter can learn, and how large its file is. 8 to 16 is usual for a character, 16 to 32 "
        "for a style; more memorises sooner. For LoKr 100000 or more means whole matrices.",
    )
    network_alpha: float = option(
        1.0,
        "The adapter's strength is alpha / rank; 0 means alpha = rank. A smaller one slows learning like a lower "
        "learning_rate; the rank or half of it is usual.",
    )
    network_dropout: float = option(
        0.0,
        "Chance of each rank activation to be dropped in training (0 to 1). 0.1 helps against memorising few pictures.",
    )
    network_args: tuple[str, ...] = option(
        (), "Further arguments of the network module, each 'key=value'; docs/adapters.md lists them."
    )
    train_norm: bool = option(
        True,
        "Train every norm weight of the model as a difference, saved with the adapter. Turn it off for "
        "adapter_format diffusers.",
    )
    train_llm_adapter: bool = option(True, "Train the LLM adapter's Linears and norms as well.")
    unet_lr: float | None = option(None, "Learning rate of the transformer's part. Unset: learning_rate.")
    llm_adapter_lr: float | None = option(
        None, "Learning rate of the LLM adapter's part; 0 leaves it untrained. Unset: that of the transformer's."
    )
    text_encoder_lr: float | None = option(
        None, "Learning rate of Qwen3's part, with network_args train_text_encoder=true. Unset: learning_rate."
    )
    network_train_unet_only: bool = option(False, "Kohya's name for what is the default: no adapters on Qwen3.")
    network_weights: Path | None = option(None, "Adapter file to start from, of any format.")
    dim_from_weights: bool = option(False, "Take targets, types and ranks from network_weights.")
    allow_partial_weights: bool = option(
        False, "Use of an adapter file what fits the model, with a warning, rather than stop."
    )
    base_weights: tuple[Path, ...] = option((), "Adapter files merged into the model before training.")
    base_weights_multiplier: tuple[float, ...] = option(
        (), "Strength of each of base_weights; 1 where not given.", parse=parse_multipliers
    )
    scale_weight_norms: float | None = option(
        None,
        "After each step, shrink every Linear's change that is longer than this (Frobenius norm), so that the adapter "
        "does not overpower others. 1 is usual. Unset: off.",
        zero_is_unset=True,
    )
    adapter_format: tuple[str, ...] = option(
        ("comfy",),
        "What the adapter is saved as: comfy, kohya, diffusers, or several of them. diffusers holds LoRA without "
        "norms and is the one form that loads in ComfyUI and diffusers alike.",
        parse=parse_formats,
    )
