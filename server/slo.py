"""Lease policy `slo`: how much of the time requests are in flight the trainer may have, from the latencies observed.

Additive increase, multiplicative decrease, as in congestion control: a request that came through with room to spare
adds `STEP` to the share, one that was at risk halves it, and for `WINDOW` requests after that it does not rise. What
was under way when the share was cut does not cut it again, as there: a rush puts all requests in flight at risk at
once. A latency is at risk beyond `MARGIN` of its target, so the share falls before a target is missed. Pure, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

MARGIN = 0.8
STEP = 0.05
BACK_OFF = 0.5
FLOOR = 0.01
"""A smaller share is none: it would be a quantum every few seconds."""
WINDOW = 8


class Observation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request, done or as far as it has come. What is not known is None."""

    ttft_ms: float | None = None
    """From its arrival at the server to its first token; so far, while that has not come."""
    tpot_ms: float | None = None
    """Mean time between its tokens."""
    total_ms: float | None = None
    """From arrival to the end, of an answer given as a whole: when its first token came nobody saw."""
    num_tokens: int = 0
    is_of_last_cut: bool = False
    """It arrived before the share was last cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Milliseconds; None: no target."""

    ttft_ms: float | None
    tpot_ms: float | None

    def pressure(self, seen: Observation) -> float | None:
        """The largest of its latencies over their targets: beyond 1 one is missed. None: nothing to judge it by."""
        ratios = []
        if self.ttft_ms is not None and seen.ttft_ms is not None:
            ratios.append(seen.ttft_ms / self.ttft_ms)
        if self.tpot_ms is not None and seen.tpot_ms is not None:
            ratios.append(seen.tpot_ms / self.tpot_ms)
        if self.ttft_ms is not None and self.tpot_ms is not None and seen.total_ms is not None:
            ratios.append(
                seen.total_ms / (self.ttft_ms + max(0, seen.num_tokens - 1) * self.tpot_ms)
            )
        return max(ratios, default=None)

    def is_at_risk(self, seen: Observation) -> bool:
        pressure = self.pressure(seen)
        return pressure is not None and pressure > MARGIN


def decide(share: float, recent: Sequence[Observation], targets: Targets) -> float:
    """The share from now on, 0 to 1.

    Args:
        share: the share so far.
        recent: requests that are done, the newest last; at least the last `WINDOW` of them.
    """
    at_risk = [targets.is_at_risk(seen) for seen in recent[-WINDOW:]]
    if at_risk[-1]:
        if recent[-1].is_of_last_cut:
            return share
        share *= BACK_OFF
        return share if share >= FLOOR else 0.0
    if any(at_risk) or targets.pressure(recent[-1]) is None:
        return share
    return min(1.0, share + STEP)
