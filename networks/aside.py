"""Work beside the current stream's: what nobody waits for yet fills the gaps of large products and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Aside:
    """Runs functions on a stream of its own, one after the other; on a CPU, at once.

    What they read must stay as it is, and what they return must not be used, until `join`.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: list[tuple[Tensor, ...]] = []

    def run(self, function: Callable[..., T], *tensors: Tensor) -> T:
        """Returns what the function makes of the tensors, as they are by now."""
        if self._stream is None:
            return function(*tensors)
        self._kept.append(tensors)  # or the current stream would use their memory again
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            return function(*tensors)

    def join(self) -> None:
        """From here on the current stream may use the results."""
        if self._kept:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._kept.clear()
