"""Recording CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# Runs before a recording, in which compilers and libraries settle on their kernels and workspaces.
_WARM_UPS = 2


def recorded(work: Callable[[], T], stream: torch.cuda.Stream, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of the work, which has run on that stream before, and what it returned: replays write that anew."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with recording(graph, pool=pool, stream=stream):
        result = work()
    return graph, result


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`, but for what it does where work fails inside that has gone to further streams.

    Ending the recording fails as well then: torch stays on the recording stream, and tells of the streams instead of
    the lack of memory that it came from. Other threads may go on using CUDA meanwhile.
    """
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            yield
    except RuntimeError as error:
        torch.cuda.set_stream(stream)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, torch.OutOfMemoryError):
            cause = cause.__context__
        raise error if cause is None else cause  # noqa: B904


def first_line(error: RuntimeError) -> str:
    """What went wrong, without what CUDA adds to it."""
    return str(error).strip().partition("\n")[0]
