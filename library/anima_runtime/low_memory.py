"""Training where the whole model does not fit: blocks with 8-bit weights, and blocks that lie in main memory.

Both are for the frozen weights of the transformer's blocks alone, and follow the adapters' attachment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.anima_runtime.float8 import quantise
from library.anima_runtime.transformer import AnimaTransformer
from library.errors import SettingError
from library.options import option


@dataclass(frozen=True)
class MemorySettings:
    """What of the model takes less of the card's memory."""

    fp8_base: bool = option(
        False,
        "Keep the frozen weights of the blocks in 8 bits (e4m3, a scale for each row), but for the modulations': 1.8 GB "
        "less for the full model. Products stay in the model's precision; the rounding changes the model a little.",
        aliases=("fp8_base_unet",),
    )
    blocks_to_swap: int = option(
        0,
        "So many of the transformer's blocks lie in main memory and come to the card when their turn is: 140 MB less "
        "for each, and slower steps. Needs gradient_checkpointing.",
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
    """Keeps the last blocks' frozen weights in pinned main memory, and two blocks of them on the device.

    A block's weights arrive before it runs; while it runs, those of the next come, or in the backward pass, where the
    blocks run once more from last to first, those of the one before. Weights never change, so none are copied back.
    """

    def __init__(self, transformer: AnimaTransformer, count: int, device: torch.device) -> None:
        self._first = len(transformer.blocks) - count
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks = [_frozen_tensors(block) for block in transformer.blocks[self._first :]]
        self._home = [[_pinned(tensor, device) for tensor in tensors] for tensors in self._blocks]
        self._slots = [[torch.empty_like(home, device=device) for home in self._home[0]] for _ in range(2)]
        self._arrived: list[torch.cuda.Event | None] = [None, None]
        self._in_slot: list[int | None] = [None, None]
        self._last = -1
        for number, block in enumerate(transformer.blocks[self._first :]):
            self._take_back(number)
            # The first module a block runs, whether it is called or computed again in the backward pass.
            block.adaln_modulation_self_attn.register_forward_pre_hook(lambda *_, number=number: self._before(number))

    def _before(self, number: int) -> None:
        """Has a block's weights in place, and the next one's on their way."""
        self._fetch(number)
        arrived = self._arrived[number % 2]
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        backward = 0 < number <= self._last
        self._last = number
        following = number - 1 if backward else number + 1
        if 0 <= following < len(self._blocks):
            self._fetch(following)

    def _fetch(self, number: int) -> None:
        """Copies a block's weights into its slot, unless they are there, once what used the slot has run."""
        slot = number % 2
        if self._in_slot[slot] == number:
            return
        former = self._in_slot[slot]
        if former is not None:
            self._take_back(former)
        if self._stream is None:
            self._copy(number, slot)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._copy(number, slot)
                self._arrived[slot] = self._stream.record_event()
        self._in_slot[slot] = number
        for tensor, buffer in zip(self._blocks[number], self._slots[slot], strict=True):
            tensor.data = buffer

    def _copy(self, number: int, slot: int) -> None:
        for buffer, home in zip(self._slots[slot], self._home[number], strict=True):
            buffer.copy_(home, non_blocking=True)

    def _take_back(self, number: int) -> None:
        """Leaves a block without weights, so that a use out of turn is an error."""
        for tensor in self._blocks[number]:
            tensor.data = tensor.data.new_empty(0)


def _frozen_tensors(block: nn.Module) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    home = tensor.detach().to("cpu")
    return home.pin_memory() if device.type == "cuda" else home.clone()


def place_transformer(transformer: AnimaTransformer, settings: MemorySettings, device: torch.device) -> None:
    """Brings a transformer that was loaded into main memory to the device, as far as it shall lie there."""
    if settings.fp8_base:
        quantise_blocks(transformer)
    if settings.blocks_to_swap:
        BlockSwap(transformer, settings.blocks_to_swap, device)
    swapped = set(transformer.blocks[len(transformer.blocks) - settings.blocks_to_swap :])
    for name, child in transformer.named_children():
        if name != "blocks":
            child.to(device)
    for block in transformer.blocks:
        if block not in swapped:
            block.to(device)
