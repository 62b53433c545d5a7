"""What the processes of a run do together: each function works alone as well."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn

from library.errors import UserError


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces each float32 tensor by its sum over all processes, in one exchange."""
    if not distributed.is_initialized():
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with _naming_lost_processes():
        distributed.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def sum_gradients(parameters: Iterable[nn.Parameter], others: Sequence[Tensor]) -> None:
    """`sum_over_processes` for the gradients and other tensors; a gradient that only this process lacks counts as 0."""
    if not distributed.is_initialized():
        return
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:  # its module was dropped out, here
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    sum_over_processes([*gradients, *others])


class StopVote:
    """Whether any process wants to stop: all must leave the loop after the same step, or one waits forever.

    Of several processes the answer to one step's wishes comes after the next step, so that no step waits for its GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked: tuple[Tensor, torch.cuda.Event | None] | None = None

    def cast(self, wants_to_stop: bool) -> bool:
        """Takes in this process's wish, once a step; returns whether to stop now."""
        if not distributed.is_initialized():
            return wants_to_stop
        with _naming_lost_processes():
            stops = self._answer()
            wishes = torch.full((), float(wants_to_stop), device=self._device)
            distributed.all_reduce(wishes)
            self._ask(wishes)
        return stops

    def _ask(self, wishes: Tensor) -> None:
        """Has the sum of all wishes brought to main memory, without waiting for it."""
        if wishes.device.type != "cuda":
            self._asked = wishes, None
            return
        arrived, on_host = torch.cuda.Event(), torch.empty((), pin_memory=True)
        on_host.copy_(wishes, non_blocking=True)
        arrived.record()
        self._asked = on_host, arrived

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        wishes, arrived = self._asked
        if arrived is not None:
            arrived.synchronize()
        return wishes.item() > 0


def gather_lists(own: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    with _naming_lost_processes():
        return gather_object(own)


def is_first_to_tell(text: str) -> bool:
    """Whether no other process of this run has asked this of the same text: most errors are the same on all."""
    if not distributed.is_initialized():
        return True
    try:
        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=5)
        )
        return store.add(f"told/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except (RuntimeError, KeyError):  # the store ended with the process that kept it: rather twice than never
        return True


@contextmanager
def _naming_lost_processes() -> Iterator[None]:
    """An exchange fails where a process has ended; what it says then is of sockets."""
    try:
        yield
    except RuntimeError as error:
        if not distributed.is_initialized():
            raise
        raise UserError("another process of this run has ended; its own message tells why") from error
