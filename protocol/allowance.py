"""How long the trainer may run while requests are in flight: a share of that time, spent in quanta.

While requests are in flight every second earns `share` of one, and every second the trainer runs costs one. What is
earned collects up to two quanta, so that a late wake-up loses nothing. A trainer that has spent it waits until it has a
whole quantum again: it looks only between operations, and every change of hands costs both sides their caches. One that
runs past the allowance is paid back by waiting longer.
"""

from __future__ import annotations

import math

QUANTUM_S = 0.02
MAX_DEBT_S = 0.5
"""Debt beyond this is forgiven: a few very long operations must not stop training for minutes."""


class Allowance:
    """Seconds in hand, negative: owed. Pure: the caller says what time has passed."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def ran(self, seconds: float, share: float) -> float:
        """The trainer ran for `seconds` while requests were in flight; the part of them that it was not allowed."""
        if share >= 1:
            return 0.0
        if share <= 0:
            self.seconds = 0.0
            return seconds
        after = self.seconds - (1 - share) * seconds
        self.seconds = max(-MAX_DEBT_S, after)
        return min(seconds, max(0.0, -after / (1 - share)))

    def waited(self, seconds: float, share: float) -> None:
        """The trainer waited for `seconds` while requests were in flight."""
        self.seconds = min(2 * QUANTUM_S, self.seconds + share * seconds)

    def is_spent(self, share: float) -> bool:
        return share < 1 and self.seconds <= 0

    def until_earned(self, share: float) -> float:
        """Seconds of waiting until there is a quantum to run; infinite without a share."""
        if share >= 1:
            return 0.0
        missing = max(0.0, QUANTUM_S - self.seconds)
        return missing / share if share > 0 else math.inf
