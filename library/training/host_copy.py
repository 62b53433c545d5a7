"""Copies of what a run holds, in main memory, so that a thread can write them while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from threading import Thread
from typing import Any

import torch
from torch import Tensor

# Small tensors are copied so many bytes at a time: a copy of its own takes 10 µs each, and an adapter's save has 5,000.
_PIECE_BYTES = 32 * 2**20


def reserve_host_memory(tensors: Iterable[Tensor], copies: int) -> Thread | None:
    """Has a thread take pinned memory for so many copies of the tensors, and leave it to torch for later ones.

    The system takes its time to pin memory, and the first save would wait for it with the run standing still.
    Returns the thread; None without a GPU, where nothing is pinned.
    """
    pieces = _pieces([tensor for tensor in tensors if tensor.is_cuda] * copies)
    forms = [(sum(tensor.numel() for tensor in piece), piece[0].dtype) for piece in pieces]
    if not forms:
        return None

    def take() -> None:
        kept = [torch.empty(size, dtype=dtype, pin_memory=True) for size, dtype in forms]
        kept.clear()

    thread = Thread(target=take, name="pinning", daemon=True)
    thread.start()
    return thread


class HostCopy:
    """A copy of nested dicts, lists and tuples whose tensors are on their way to main memory.

    It has the values as they are when it is made; neither host nor device waits. From a GPU tensors come in a few large
    pieces through pinned memory, which torch keeps for the next time. Tensors of one piece are views of it.
    """

    def __init__(self, value: Any) -> None:
        tensors = list(_tensors_of(value))
        self._copy = _with_tensors(value, iter(_copies_of(tensors)))
        self._arrived = None
        if any(tensor.is_cuda for tensor in tensors):
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> Any:
        """The same dicts, lists and tuples, once all tensors have come."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


def bytes_of(value: Any) -> int:
    """Of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(bytes_of, value))


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors, in the order in which `_with_tensors` asks for them."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_of(item)


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, Mapping):
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(item, tensors) for item in value)
    return copy.deepcopy(value)


def _copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in main memory, in the order of the tensors; those from a GPU are there once the device has finished."""
    copies: dict[int, Tensor] = {
        number: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        for number, tensor in enumerate(tensors)
        if not tensor.is_cuda
    }
    numbers = [number for number, tensor in enumerate(tensors) if tensor.is_cuda]
    taken = iter(numbers)
    for piece in _pieces([tensors[number] for number in numbers]):
        joined = torch.cat([tensor.reshape(-1) for tensor in piece])
        host = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True).copy_(joined, non_blocking=True)
        parts = host.split([tensor.numel() for tensor in piece])
        copies |= {next(taken): part.view(tensor.shape) for tensor, part in zip(piece, parts, strict=True)}
    return [copies[number] for number in range(len(tensors))]


def _pieces(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in their order, in groups of one dtype and of as many as `_PIECE_BYTES` hold; larger ones alone."""
    pieces: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not pieces or tensor.dtype != pieces[-1][0].dtype or tensor.nbytes > room:
            pieces.append([])
            room = _PIECE_BYTES
        pieces[-1].append(tensor)
        room -= tensor.nbytes
    return pieces
