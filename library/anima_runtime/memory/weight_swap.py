"""Frozen weights of blocks that lie in main memory, and come to the device when it is their block's turn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WeightSwap:
    """Keeps the weights of so many blocks in pinned main memory, and those of two blocks on the device.

    While a block runs, the weights of the next one come, or in the backward pass, where blocks run from last to first,
    those of the one before. Weights never change, so none are copied back.

    slots: places on the device; a block's are those of its number's last bit. in_slot: whose weights are in each.
    """

    def __init__(self, blocks: int, device: torch.device) -> None:
        self.device = device
        self.homes: list[list[Tensor]] = [[] for _ in range(blocks)]
        self.slots: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.in_slot: list[int | None] = [None, None]
        self._arrived: list[torch.cuda.Event | None] = [None, None]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def add(self, number: int, weight: Tensor) -> Tensor:
        """Takes a further weight of a block; returns its place on the device. All blocks must have the same ones."""
        home, homes, slots = weight.detach().to("cpu"), self.homes[number], self.slots[number % 2]
        homes.append(home.clone() if self._stream is None else home.pin_memory())
        if len(slots) < len(homes):
            slots.append(torch.empty_like(home, device=self.device))
        return slots[len(homes) - 1]

    def begin(self) -> None:
        """Begins a forward pass with nothing in the slots: what a CUDA graph records must not go by earlier passes."""
        self.in_slot = [None, None]
        self._fetch(0)

    def enter(self, number: int, backward: bool, ends: bool = False) -> None:
        """Has the device wait for a block's weights, and sends for those of the block that follows.

        ends: whether none does, as the pass goes no further. A CUDA graph cannot record copies that nothing waits for.
        """
        self._fetch(number)
        arrived = self._arrived[number % 2]
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        following = number - 1 if backward else number + 1
        if not ends and 0 <= following < len(self.homes):
            self._fetch(following)

    def _fetch(self, number: int) -> None:
        """Copies a block's weights into its slot, unless they are there, once what used the slot has run."""
        slot = number % 2
        if self.in_slot[slot] == number:
            return
        self.in_slot[slot] = number
        if self._stream is None:
            self._copy(number)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._copy(number)
            self._arrived[slot] = self._stream.record_event()

    def _copy(self, number: int) -> None:
        for place, home in zip(self.slots[number % 2], self.homes[number], strict=True):
            place.copy_(home, non_blocking=True)


class SwappedBlock(NamedTuple):
    """One of the blocks of a `WeightSwap`."""

    swap: WeightSwap
    number: int

    def add(self, weight: Tensor) -> Tensor:
        """See `WeightSwap.add`."""
        return self.swap.add(self.number, weight)

    def enter(self, backward: bool, ends: bool = False) -> None:
        """See `WeightSwap.enter`."""
        self.swap.enter(self.number, backward, ends)
