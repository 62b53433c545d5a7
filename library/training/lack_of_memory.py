"""What a run does and says when something needs more GPU memory than there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from library.data.dataset import Batch
from library.errors import UserError
from library.training.captured import CapturedBackward

T = TypeVar("T")


@contextmanager
def explaining_lack_of_memory(batches: Sequence[Batch]) -> Iterator[None]:
    """Inside is a step of these batches; UserError with what would help where memory does not suffice for it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory_message(batches)) from error


def tried_twice(work: Callable[[], T], recorded: Callable[[], CapturedBackward | None]) -> T:
    """What `work` returns; where memory does not suffice, recorded steps give theirs back and it is tried once more."""
    try:
        return work()
    except torch.OutOfMemoryError:
        if recorded() is None:
            raise
    recorded().release()  # outside, where the error no longer holds what the first try took
    return work()


def out_of_memory_message(batches: Sequence[Batch]) -> str:
    """What was being trained when the GPU's memory ran out, and what would help."""
    shapes = sorted({f"{len(batch.captions)} x {batch.bucket[0]}x{batch.bucket[1]}" for batch in batches})
    return (
        f"CUDA out of memory while training a batch of {' or '.join(shapes)} pixels. The adapter was saved as it was "
        "before this step. What needs less memory: gradient_checkpointing = true, a smaller batch_size "
        "(with gradient_accumulation_steps to make up for it), a smaller resolution."
    )
