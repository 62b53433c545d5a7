"""Copies of what a run holds, in main memory, so that a thread can write them while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from threading import Thread
from typing import Any

import torch
from torch import Tensor


def copy_to_host(value: Any) -> Any:
    """The same nested dicts, lists and tuples with a copy of every tensor in main memory; other values are copied too.

    From a GPU all tensors are copied in one go through pinned memory, which torch keeps for the next time: the call
    waits for the device once.
    """
    copied = _copied(value)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def reserve_host_memory(tensors: Iterable[Tensor], copies: int) -> Thread | None:
    """Has a thread take pinned memory for so many copies of the tensors, and leave it to torch for later ones.

    The system takes its time to pin memory, and the first save would wait for it with the run standing still.
    Returns the thread; None without a GPU, where nothing is pinned.
    """
    forms = [(tensor.shape, tensor.dtype) for tensor in tensors if tensor.is_cuda for _ in range(copies)]
    if not forms:
        return None

    def take() -> None:
        kept = [torch.empty(shape, dtype=dtype, pin_memory=True) for shape, dtype in forms]
        kept.clear()

    thread = Thread(target=take, name="pinning", daemon=True)
    thread.start()
    return thread


def bytes_of(value: Any) -> int:
    """Of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(bytes_of, value))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _tensor_copied(value.detach())
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)


def _tensor_copied(tensor: Tensor) -> Tensor:
    pinned = tensor.is_cuda
    target = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return target.copy_(tensor, non_blocking=pinned)
