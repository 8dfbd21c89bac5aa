"""A stack of ids in one numpy array."""

from __future__ import annotations

import numpy as np

Ids = np.ndarray
"""int64 [n]: records, rows, slots or generations."""


class IdStack:
    """Ids, taken from the end."""

    def __init__(self, ids: Ids) -> None:
        self._ids, self._count = ids.astype(np.int64), ids.size

    def __len__(self) -> int:
        return self._count

    def all(self) -> Ids:
        return self._ids[: self._count].copy()

    def pop(self, count: int) -> Ids:
        """`count` ids; there must be so many."""
        self._count -= count
        assert self._count >= 0
        return self._ids[self._count : self._count + count].copy()

    def push(self, ids: Ids) -> None:
        end = self._count + ids.size
        if end > self._ids.size:
            self._ids = np.concatenate((self._ids[: self._count], ids, np.empty(end, np.int64)))
        else:
            self._ids[self._count : end] = ids
        self._count = end

    def remove(self, ids: Ids) -> None:
        """Take out these, wherever they are; they must be there."""
        kept = self.all()
        # Mostly the uppermost.
        if not np.array_equal(kept[self._count - ids.size :], ids):
            kept = kept[~np.isin(kept, ids)]
            assert kept.size == self._count - ids.size
            self._ids[: kept.size] = kept
        self._count -= ids.size

    def reset(self, ids: Ids) -> None:
        self._ids, self._count = ids.copy(), ids.size
