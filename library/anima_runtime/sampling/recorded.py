"""The model's forward pass as CUDA graphs: launched at once, where a host is slower than the GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from library.cuda_graphs import first_line, recorded

logger = logging.getLogger(__name__)


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class RecordedForward:
    """A function of tensors on one GPU, without gradients, that is recorded for each set of shapes and then replayed.

    It goes on with the weights that the function had, as they are by then, if they stay where they are. What it
    recorded lies in GPU memory for as long as it lives. On a CPU, and where recording fails, the function is called.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}
        self._works = True

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> Tensor:
        """The function's result; of the same shapes, tensors have the same dtypes each time."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if not self._works or not all(tensor.is_cuda for tensor in tensors):
            return self._function(*tensors)
        if shapes not in self._recordings:
            try:
                self._recordings[shapes] = self._record(tensors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what CUDA and torch raise for work that cannot be recorded
                logger.warning("cuda_graphs: pictures are rendered without: %s", first_line(error))
                self._works = False
                return self._function(*tensors)
        recording = self._recordings[shapes]
        for own, given in zip(recording.inputs, tensors, strict=True):
            own.copy_(given)
        recording.graph.replay()
        return recording.output.clone()

    def _record(self, tensors: tuple[Tensor, ...]) -> _Recording:
        inputs = tuple(tensor.clone() for tensor in tensors)
        graph, output = recorded(lambda: self._function(*inputs), torch.cuda.Stream())
        return _Recording(graph, inputs, output)
