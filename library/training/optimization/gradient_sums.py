"""Gradients added to what is there as they come, so that they are not all in memory a second time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# So many bytes of gradients are added at a time: a launch for each of hundreds of tensors takes 2 µs of an H200.
_BYTES_AT_A_TIME = 2**24


def add_gradients(loss: Tensor, parameters: Sequence[nn.Parameter], at_a_time: int = _BYTES_AT_A_TIME) -> None:
    """Adds a loss's gradients to the parameters' `.grad`, which are there, and stay where they are."""
    sums = {id(parameter): parameter.grad for parameter in parameters}
    come: list[nn.Parameter] = []
    bytes_come = 0

    def add() -> None:
        nonlocal bytes_come
        torch._foreach_add_([sums[id(parameter)] for parameter in come], [parameter.grad for parameter in come])
        for parameter in come:
            parameter.grad = None
        come.clear()
        bytes_come = 0

    def has_come(parameter: nn.Parameter) -> None:
        nonlocal bytes_come
        come.append(parameter)
        bytes_come += parameter.grad.nbytes
        if bytes_come >= at_a_time:
            add()

    hooks = [parameter.register_post_accumulate_grad_hook(has_come) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward(inputs=parameters)
        if come:
            add()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = sums[id(parameter)]
