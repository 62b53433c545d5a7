"""The processes of a run, which share the work of preparing its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def _own(items: list[Any]) -> list[Any]:
    return items


@dataclass(frozen=True)
class Team:
    """One process of several, or the only one.

    gather: takes each process's list and gives all of them the lists of all, one after the other; every process must
    call it equally often.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[list[Any]], list[Any]] = _own

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a list that all of them have."""
        return items[self.rank :: self.size]


ALONE = Team()
