"""Training where the whole model does not fit: blocks with 8-bit weights, and blocks that lie in main memory.

Both are for the frozen weights of the transformer's blocks alone, and follow the adapters' attachment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from library.anima_runtime.memory.float8 import quantise
from library.anima_runtime.memory.weight_swap import WeightSwap
from library.anima_runtime.transformer import AnimaTransformer
from library.errors import SettingError
from library.options import option


@dataclass(frozen=True)
class MemorySettings:
    """What of the model takes less of the card's memory."""

    fp8_base: bool = option(
        False,
        "Keep the frozen weights of the blocks in 8 bits (e4m3, a scale for each row): 1.8 GB less for the full model. "
        "Products stay in the model's precision; the rounding changes the model a little.",
        aliases=("fp8_base_unet",),
    )
    blocks_to_swap: int = option(
        0,
        "So many of the transformer's blocks lie in main memory and come to the card when their turn is, two at a "
        "time: about 120 MB less for each but two, 60 MB with fp8_base, and somewhat slower steps. Needs "
        "gradient_checkpointing.",
    )

    @property
    def is_used(self) -> bool:
        """Whether anything is asked for."""
        return self.fp8_base or self.blocks_to_swap > 0


def check_swap(settings: MemorySettings, depth: int) -> None:
    """SettingError where more blocks shall be swapped than the model has."""
    if settings.blocks_to_swap > depth:
        raise SettingError(f"blocks_to_swap: {settings.blocks_to_swap} is more than the model's {depth} blocks")


def quantise_blocks(transformer: AnimaTransformer) -> None:
    """Rounds the weights of the blocks' Linears to 8 bits, but for the modulations', which are 9 % of them."""
    for block in transformer.blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("adaln_modulation_"):
                quantise(module)


class BlockSwap:
    """Swaps the weights of the last `count` blocks, for blocks that run module by module.

    A block's parameters and buffers are on the device when its turn is, and empty until then.
    """

    def __init__(self, transformer: AnimaTransformer, count: int, device: torch.device) -> None:
        blocks = transformer.blocks[len(transformer.blocks) - count :]
        self._swap = WeightSwap(len(blocks), device)
        self._tensors = [[*block.parameters(), *block.buffers()] for block in blocks]
        self._last = -1
        for number, block in enumerate(blocks):
            for tensor in self._tensors[number]:
                self._swap.add(number, tensor)
            self._take_back(number)
            # The first module a block runs, whether it is called or computed again in the backward pass.
            first = block.adaln_modulation_self_attn
            first.register_forward_pre_hook(lambda *_, number=number: self._before(number))

    def _before(self, number: int) -> None:
        """Has a block's weights in place, and the next one's on their way."""
        before = list(self._swap.in_slot)
        self._swap.enter(number, backward=0 < number <= self._last)
        self._last = number
        for former, now, slot in zip(before, self._swap.in_slot, self._swap.slots, strict=True):
            if former != now:
                if former is not None:
                    self._take_back(former)
                for tensor, place in zip(self._tensors[now], slot, strict=True):
                    tensor.data = place

    def _take_back(self, number: int) -> None:
        """Leaves a block without weights, so that a use out of turn is an error."""
        for tensor in self._tensors[number]:
            tensor.data = tensor.data.new_empty(0)


def place_transformer(transformer: AnimaTransformer, settings: MemorySettings, device: torch.device) -> None:
    """Brings a transformer from main memory, where it was loaded, to the device, but for blocks to be swapped."""
    if settings.fp8_base:
        quantise_blocks(transformer)
    swapped = set(transformer.blocks[len(transformer.blocks) - settings.blocks_to_swap :])
    for name, child in transformer.named_children():
        if name != "blocks":
            child.to(device)
    for block in transformer.blocks:
        if block not in swapped:
            block.to(device)
