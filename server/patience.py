"""How long something that owes us an answer has not got on, of the time in which it was allowed to."""

from __future__ import annotations

from collections.abc import Hashable


class Patience:
    """A clock that stands while the other side may not run, and begins anew whenever it gets on."""

    def __init__(self) -> None:
        self._mark: Hashable = None
        self.waited_s = 0.0

    def look(self, mark: Hashable, seconds: float, share: float) -> float:
        """Seconds without progress so far.

        Args:
            mark: differs from the last one when there was progress.
            seconds: since the last look.
            share: of these, the part in which the other side was allowed to run, 0 to 1.
        """
        if mark != self._mark:
            self._mark, self.waited_s = mark, 0.0
        else:
            self.waited_s += seconds * share
        return self.waited_s
