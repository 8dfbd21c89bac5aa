"""What is made of a plan once a batch, and asked for by every layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from . import PathBlock

T = TypeVar("T")
_KEPT = 4


class Kept(Generic[T]):
    """Of the last few plans. A plan is known by its identity, and lives as long as what was made of it."""

    def __init__(self) -> None:
        self._entries: list[tuple[list[PathBlock], Hashable, T]] = []

    def of(self, plan: list[PathBlock], sizes: Hashable, make: Callable[[], T]) -> T:
        """What was made of `plan` by the same `sizes`, or what `make` makes now."""
        for known, by, found in self._entries:
            if known is plan and by == sizes:
                return found
        made = make()
        self._entries.insert(0, (plan, sizes, made))
        del self._entries[_KEPT:]
        return made
