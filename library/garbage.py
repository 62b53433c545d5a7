"""Python's search for garbage in cycles, kept from work that makes many objects and no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, or in a function that this decorates, no cycles are looked for; all else is freed as ever.

    Python looks through all objects whenever there are a quarter more: a sixth of a start with 100,000 pictures.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def kept_as_is() -> Iterator[None]:
    """Inside, what is there already counts as no garbage: the search passes over it.

    With models and libraries loaded it takes 70 ms each time otherwise, in which a loop stands still.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
