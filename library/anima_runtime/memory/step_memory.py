"""What a run will take of a card's memory, by what was measured: see docs/performance.md."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from library.anima_runtime.config import AnimaConfig
from library.anima_runtime.transformer import AnimaTransformer

# How many tensors of the residual stream's size a block leaves for the backward pass, rounded up: module by module, by
# own kernels, and by these selectively.
_BY_MODULES, _BY_OWN_KERNELS, _SELECTIVELY = 32, 27, 15
# Of each trained number in float32: itself, its gradient, AdamW's two moments, and a copy.
_BYTES_OF_A_TRAINED_NUMBER = 20
_OF_QWEN, _OF_THE_VAE, _OF_SAMPLES = 5 * 2**28, 2**30, 2**30
# CUDA's libraries, memory that PyTorch holds and cannot use, recorded steps, and some to spare.
_OF_ALL_ELSE = 3 * 2**30


class AlsoThere(NamedTuple):
    """What is on the card beside the transformer: whether captions, pictures and samples are encoded and rendered."""

    qwen: bool
    vae: bool
    samples: bool


def needed_memory(
    config: AnimaConfig,
    tokens: int,
    dtype: torch.dtype,
    eight_bits: bool,
    fuses: bool,
    network: nn.Module | None,
    also: AlsoThere,
) -> tuple[int, int]:
    """Bytes of the card for steps of batches of up to so many tokens, and for such that keep less selectively.

    fuses: whether own kernels compute the blocks. network: what is trained, where that is known.
    """
    with torch.device("meta"):
        weights = _numbers(AnimaTransformer(config)) * (1 if eight_bits else dtype.itemsize)
    trained = 0 if network is None else _BYTES_OF_A_TRAINED_NUMBER * _numbers(network)
    others = also.qwen * _OF_QWEN + also.vae * _OF_THE_VAE + also.samples * _OF_SAMPLES + _OF_ALL_ELSE
    there, one = weights + trained + others, config.depth * tokens * config.width * dtype.itemsize
    return there + one * (_BY_OWN_KERNELS if fuses else _BY_MODULES), there + one * _SELECTIVELY


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
