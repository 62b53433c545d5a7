"""Recording CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
