"""A batch's forward and backward pass as one CUDA graph: launched at once, instead of thousands of kernels in turn.

At batch 1 a step of the model is a few thousand kernels of some microseconds each, which a host cannot launch as fast
as the GPU runs them. A graph holds them for one set of shapes; its inputs are copied into place before each replay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.cuda_graphs import first_line, recorded
from library.training.optimization.gradient_sums import add_gradients

logger = logging.getLogger(__name__)

# Each graph keeps its kernels' descriptions in GPU memory; shapes beyond these run without one.
MOST_GRAPHS = 64


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    share: Tensor
    losses: Tensor


class CapturedBackward:
    """Computes a loss and adds its gradients to the parameters' `.grad`, which stay where they are.

    losses: tensor work alone, from a NamedTuple of tensors to the loss of each sample; see ModelHooks.losses.
    All graphs share one memory pool, as they run one after another.
    """

    def __init__(self, losses: Callable[[Any], Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self._losses = losses
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # one: libraries keep a workspace of 64 MiB for each
        self._graphs: dict[tuple[Any, ...], _Captured] = {}
        self._works = True

    def release(self) -> None:
        """Gives the graphs' memory back; each is recorded again when its shapes next come."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def __call__(self, inputs: Any, share: float) -> Tensor:
        """The loss of each sample, detached; the gradients of their sum times `share` are added."""
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if shapes not in self._graphs and len(self._graphs) < MOST_GRAPHS and self._works:
            try:
                self._graphs[shapes] = self._capture(inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what CUDA and torch raise for work that cannot be recorded
                logger.warning("cuda_graphs: this step cannot be recorded, so steps run without: %s", first_line(error))
                self._works = False
            if len(self._graphs) == MOST_GRAPHS:
                logger.warning(
                    "cuda_graphs: %d shapes of batches are recorded, and no more will be: steps of others, by bucket, "
                    "batch size and length of captions, take longer",
                    MOST_GRAPHS,
                )
        if shapes not in self._graphs:
            return self._accumulate(inputs, torch.full((), share, device=inputs[0].device))
        captured = self._graphs[shapes]
        for static, given in zip(captured.inputs, inputs, strict=True):
            static.copy_(given)
        captured.share.fill_(share)
        captured.graph.replay()
        return captured.losses.clone()

    def _capture(self, inputs: Any) -> _Captured:
        static = type(inputs)(*(tensor.clone() for tensor in inputs))
        share = torch.zeros((), device=inputs[0].device)  # so that warming up adds nothing
        random = torch.cuda.get_rng_state()
        graph, losses = recorded(lambda: self._accumulate(static, share), self._stream, self._pool)
        torch.cuda.set_rng_state(random)  # the first replay draws what any other would
        return _Captured(graph, static, share, losses)

    def _accumulate(self, inputs: Any, share: Tensor) -> Tensor:
        losses = self._losses(inputs)
        add_gradients(losses.sum() * share, self._parameters)
        return losses.detach()
