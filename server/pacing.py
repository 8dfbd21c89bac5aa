"""Watches the pace of every request in the HTTP process, and sets the lease's share by it (policy `slo`).

What is done goes to the controller in `slo.py`. What is in flight is a brake: as long as one request has waited for its
first token, or has got its tokens, so slowly that a target is at risk, the trainer gets nothing at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from alchemist.protocol.lease import Lease
from alchemist.server.config import Config
from alchemist.server.slo import MARGIN, WINDOW, Observation, Targets, decide

_MIN_TOKENS = 4
"""Gaps between tokens before their mean says something."""


def apply_policy(config: Config, lease: Lease) -> Pacing | None:
    """Set the share the policy begins with; under `slo`, what will change it."""
    shares = {"share": config.lease_share, "none": 1.0}
    lease.set_share(shares.get(config.lease_policy, 0.0))
    if config.lease_policy != "slo":
        return None
    return Pacing(lease, Targets(ttft_ms=config.slo_ttft_ms, tpot_ms=config.slo_tpot_ms))


class Pacing:
    """One event loop's requests. The only one who sets the share, from no share on."""

    def __init__(self, lease: Lease, targets: Targets) -> None:
        self._lease = lease
        self.targets = targets
        self.share = 0.0
        self.num_cuts = 0
        self._recent: deque[Observation] = deque(maxlen=WINDOW)
        self._slow: set[Pace] = set()

    @contextlib.contextmanager
    def watch(self, is_stream: bool) -> Iterator[Pace]:
        """One request, from its arrival on; it ends with the block, however that is left."""
        pace = Pace(self, is_stream)
        try:
            yield pace
        finally:
            pace.close()
            self.mark(pace, is_slow=False)

    def finished(self, seen: Observation) -> None:
        self._recent.append(seen)
        before = self.share
        self.share = decide(before, list(self._recent), self.targets)
        self.num_cuts += self.share < before
        self._write()

    def mark(self, pace: Pace, *, is_slow: bool) -> None:
        if is_slow != (pace in self._slow):
            (self._slow.add if is_slow else self._slow.discard)(pace)
            self._write()

    def _write(self) -> None:
        self._lease.set_share(0.0 if self._slow else self.share)


class Pace:
    """One request; it may have several answers (a list of prompts, or `n`)."""

    def __init__(self, pacing: Pacing, is_stream: bool) -> None:
        self._pacing = pacing
        self._is_stream = is_stream
        self._began = time.monotonic()
        self._cuts_before = pacing.num_cuts
        self._first: dict[str, tuple[float, int]] = {}
        """Of each answer: when its first tokens came, and how many."""
        self._waiting: asyncio.TimerHandle | None = None
        target = pacing.targets.ttft_ms
        if is_stream and target is not None:
            loop = asyncio.get_running_loop()
            self._waiting = loop.call_later(target * MARGIN / 1e3, self._is_late)

    def _is_late(self) -> None:
        self._pacing.mark(self, is_slow=True)

    def close(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()

    def saw(self, meta_info: Mapping[str, Any]) -> None:
        """What SGLang says of an answer with each of its chunks, or once at its end."""
        now = time.monotonic()
        rid, num_tokens = meta_info["id"], meta_info.get("completion_tokens", 0)
        reason = meta_info.get("finish_reason")
        is_of_last_cut = self._cuts_before < self._pacing.num_cuts
        if not self._is_stream:
            total_ms = (now - self._began) * 1e3
            seen = Observation(
                total_ms=total_ms, num_tokens=num_tokens, is_of_last_cut=is_of_last_cut
            )
        else:
            self.close()
            at, before = self._first.setdefault(rid, (now, num_tokens))
            gaps = num_tokens - before
            seen = Observation(
                ttft_ms=(at - self._began) * 1e3,
                tpot_ms=(now - at) * 1e3 / gaps if gaps else None,
                num_tokens=num_tokens,
                is_of_last_cut=is_of_last_cut,
            )
            progress = Observation(tpot_ms=seen.tpot_ms if gaps >= _MIN_TOKENS else None)
            self._pacing.mark(self, is_slow=self._pacing.targets.is_at_risk(progress))
        # An aborted answer says nothing about the pace.
        if reason is not None and reason.get("type") != "abort":
            self._pacing.finished(seen)
