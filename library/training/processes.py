"""What the processes of a run do together: each function works alone as well."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed, nn

from library.errors import UserError, first_ten


def join_group() -> None:
    """Joins the processes that a launcher has started beside this one, if any; an `Accelerator` takes the group over.

    What lies on GPUs is exchanged by NCCL, all else by gloo, which tells where a process has ended; with NCCL the
    others would wait for it, deaf to signals.
    """
    if int(os.environ.get("LOCAL_RANK", -1)) == -1:
        return
    # Its functions keep the group that there is when it is imported, as torch._dynamo does: that group's threads would
    # outlive its end, and might abort the process at its own.
    import_module("torch.distributed.nn")
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    # The main process renders samples and saves while others wait for it; by default they give up after minutes.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=timedelta(hours=6))


def make_accelerator() -> Accelerator:
    """For this process and those that a launcher has started beside it, if any; see `join_group`."""
    join_group()
    # Where there is no GPU accelerate takes each of them for one that is alone, unless it is told.
    return Accelerator(mixed_precision="no", cpu=distributed.is_initialized() and not torch.cuda.is_available())


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replaces each float32 tensor by its sum over all processes, in one exchange."""
    if not distributed.is_initialized():
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    wait_for_all()  # those that failed in this step cannot be waited for on the GPU any more
    # So what goes wrong between GPUs is something else, such as two processes on one, and NCCL's own words tell it.
    with _naming_lost_processes() if flat.device.type == "cpu" else nullcontext():
        distributed.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def prepare_exchange(device: torch.device) -> None:
    """Has the exchange between GPUs take the memory that it needs, before the first step takes all that there is."""
    sum_over_processes([torch.zeros(1, device=device)])


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


def any_wishes(wish: bool) -> bool:
    """Whether any process wishes it: all must leave the loop after the same step, or one waits forever."""
    if not distributed.is_initialized():
        return wish
    wishes = torch.tensor(float(wish))
    with _naming_lost_processes():
        distributed.all_reduce(wishes)
    return wishes.item() > 0


def wait_for_all() -> None:
    """Returns when all processes have come to here; UserError where one has ended."""
    any_wishes(False)


def gather_lists(own: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    with _naming_lost_processes():
        return gather_object(own)


def check_same(facts: Mapping[str, Any]) -> None:
    """UserError naming those facts that are not the same on all processes: they would train different adapters."""
    of_all = gather_lists([dict(facts)])
    names = dict.fromkeys(name for own in of_all for name in own)
    different = [name for name in names if any(own.get(name) != of_all[0].get(name) for own in of_all)]
    if different:
        raise UserError(
            f"the processes of this run differ in {first_ten(different)}: start them with the same settings, and let "
            "all of them have the same pictures and output_dir"
        )


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
