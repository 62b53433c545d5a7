"""Frozen weights that visit a GPU only while they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def lent_to(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Inside, the module's tensors lie on `device`; afterwards those it came with are back.

    Nothing is copied back, so the module must not be trained meanwhile. Where it lies on `device` already, nothing
    happens.
    """
    tensors = [*module.parameters(), *module.buffers()]
    at_home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in zip(tensors, at_home, strict=True):
            tensor.data = home
