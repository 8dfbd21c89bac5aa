"""Rows on the device in the order in which serving takes their slots back: nothing is searched for when it does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from alchemist.server.ids import Ids

_FEW = 16
"""Rows up to which a loop is faster than NumPy's code, which is not in the processor's caches then."""
_WINDOW = 64
"""Entries looked at in one go: most have not ended."""


class Line:
    """A queue of rows. A row leaves it by ending: its generation is another one then, and it is passed over."""

    def __init__(self, gens: Ids, num_rows: int) -> None:
        """Args:
        gens: the generation of each row, now and later; read only.
        """
        self._gens = gens
        self._rows = self._were = np.empty(0, np.int64)
        self._first = self._end = 0
        self._last = np.full(num_rows, -1)
        """By row: with which generation it came here last."""

    def append(self, rows: Ids) -> None:
        """Rows that are in the line stay where they are."""
        rows = rows[self._last[rows] != self._gens[rows]]
        end = self._end + rows.size
        if end > self._rows.size:
            waiting = self._rows[self._first : self._end]
            alive = self._gens[waiting] == self._were[self._first : self._end]
            self.reset(np.concatenate((waiting[alive], rows)))
            return
        self._rows[self._end : end] = rows
        self._were[self._end : end] = self._last[rows] = self._gens[rows]
        self._end = end

    def reset(self, rows: Ids) -> None:
        """These rows and no others, the first one first."""
        self._rows, self._were = np.empty((2, 2 * rows.size + _WINDOW), np.int64)
        self._last.fill(-1)
        self._rows[: rows.size] = rows
        self._were[: rows.size] = self._last[rows] = self._gens[rows]
        self._first, self._end = 0, rows.size

    def peek(self, count: int, fits: Callable[[Ids], np.ndarray]) -> Ids:
        """The next rows that fit, at most `count`.

        Args:
            fits: rows [n] → bool [n].
        """
        found: list[Ids] = []
        at = self._first
        while count > 0 and at < self._end:
            stop = min(self._end, at + max(count, _WINDOW))
            rows = self._rows[at:stop]
            rows = rows[self._gens[rows] == self._were[at:stop]]
            if not rows.size and at == self._first:
                self._first = stop
            fit = rows[fits(rows)][:count]
            found.append(fit)
            count -= fit.size
            at = stop
        return np.concatenate(found) if found else np.empty(0, np.int64)


class Ready:
    """Rows whose slots serving gets next, the first one first: spare ones, those with a copy, those without. What is
    needed of them then is here beforehand: a scheduler that has just computed a batch has none of this in its caches.

    Rows may end meanwhile and become spare. They keep their slots by that, so they are given all the same, if not as
    early as they might: see `is_stale`.
    """

    def __init__(self, rows: Ids, gens: Ids, *, num_free: int) -> None:
        """Args:
        rows: [n] on the device; nobody reads them.
        gens: [n] their next generations.
        num_free: rows at the beginning by which nothing is lost.
        """
        self.rows, self._gens = rows, gens
        self._pairs = list(zip(rows.tolist(), gens.tolist(), strict=True))
        self._num_free = num_free
        self._num_taken = self._num_entered = 0
        self.is_stale = False
        """Whether rows have become spare that should come first."""

    @property
    def num_left(self) -> int:
        return self.rows.size - self._num_taken

    def take(self, count: int, more: int, gens: memoryview) -> int:
        """End `count` rows in `gens`, or up to `more` if nothing is lost by it; how many."""
        first = self._num_taken
        last = self._num_taken = first + max(count, min(more, self._num_free - first))
        if last - first <= _FEW:
            for row, gen in self._pairs[first:last]:
                gens[row] = gen
        else:
            np.asarray(gens)[self.rows[first:last]] = self._gens[first:last]
        return last - first

    def enter(self) -> Ids:
        """Rows that have been taken since this was last asked."""
        rows = self.rows[self._num_entered : self._num_taken]
        self._num_entered = self._num_taken
        return rows
