"""What a recorded row is worth: FLOPs it saves per byte × the chance that feedback on its completion still comes.

All rows of a model have the same bytes, and a token's FLOPs grow with its position (attention), which the pool keeps.
The chance is estimated from the delays of the votes seen so far. Time since the answer is cut into bins of doubling
length; in each the hazard is votes over completions that were still without a vote: an estimate that treats answers
nobody has voted on yet as what they are, censored (Kaplan and Meier, 1958).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

NUM_BINS = 24
"""Up to 1 s, 2 s, 4 s, … and the last one for ever (97 days on)."""
PRIOR_CHANCE, PRIOR_COMPLETIONS = 0.1, 5.0
"""Before anything was seen: one answer in ten is voted on, half of those within a second, half of the rest within two
more, and so on, as if five had taught so. Older answers have less to hope for, so rows go in the order of their age.
"""
CERTAIN = 1 - 1e-9
"""Chance of a vote that is there."""
CONSUMED = 1e-3
"""Chance of one more vote on an answer whose vote was trained (from another user)."""


@dataclass(slots=True)
class Completion:
    """An answer that may be voted on, and its prompt's records."""

    records: np.ndarray
    """int64, by position; −1: not recorded."""
    gens: np.ndarray
    """The records' generations when it finished."""
    finished: float
    """Monotonic seconds."""
    served_by: str = ""
    """Adapter, as SGLang names it; "": the base model."""
    voted: float | None = None
    is_consumed: bool = False
    is_stale: bool = False
    """Whether it would be computed again all the same, its version being too old."""

    def is_alive(self, gen: np.ndarray) -> np.ndarray:
        """Which of `records` are still its own: bool."""
        alive: np.ndarray = (self.records >= 0) & (gen[self.records] == self.gens)
        return alive

    def alive(self, gen: np.ndarray) -> np.ndarray:
        alive: np.ndarray = self.records[self.is_alive(gen)]
        return alive


class FeedbackDelays:
    """How long after an answer its vote comes, if it comes."""

    def __init__(self) -> None:
        self._votes = np.zeros(NUM_BINS)
        self._at_risk = np.zeros(NUM_BINS)

    def came(self, delay: float) -> None:
        """A vote, `delay` seconds after its answer."""
        last = int(bin_of(np.array([delay]))[0])
        self._votes[last] += 1
        self._at_risk[: last + 1] += 1

    def left(self, age: float) -> None:
        """An answer without a vote is no longer watched."""
        self._at_risk[: int(bin_of(np.array([age]))[0]) + 1] += 1

    def chances(self, ages: np.ndarray) -> np.ndarray:
        """Chance that a vote still comes on answers without one that are `ages` seconds old.

        These answers count themselves as at risk so far: without them only answers that were voted on would.
        """
        bins = bin_of(ages)
        open_ = np.bincount(bins, minlength=NUM_BINS)[::-1].cumsum()[::-1]
        prior = PRIOR_COMPLETIONS * PRIOR_CHANCE * 0.5 ** (1 + np.arange(NUM_BINS))
        hazard = (self._votes + prior) / (self._at_risk + open_ + PRIOR_COMPLETIONS)
        survival = np.append((1 - np.minimum(hazard, 1.0))[::-1].cumprod()[::-1], 1.0)
        # Of the bin that an answer is in, half is behind it.
        within = np.sqrt(survival[bins] * survival[bins + 1])
        chances: np.ndarray = 1 - within
        return chances

    @property
    def prior(self) -> float:
        """The chance for an answer that is still being written."""
        return float(self.chances(np.zeros(1))[0])


def bin_of(delays: np.ndarray) -> np.ndarray:
    """Bin of each delay in seconds: 0 below 1 s, 1 below 2 s, 2 below 4 s, …"""
    bins = np.floor(np.log2(np.maximum(delays, 0.5))).astype(np.int64) + 1
    clipped: np.ndarray = np.clip(bins, 0, NUM_BINS - 1)
    return clipped


def worth(
    completions: Iterable[Completion],
    gen: np.ndarray,
    delays: FeedbackDelays,
    now: float,
    num_records: int,
) -> np.ndarray:
    """Chance, by record, that it will be read for some completion that has it: float64 [num_records]. Records of no
    completion, whose answers are still being written, get the prior.
    """
    known = list(completions)
    ages = np.array([now - c.finished for c in known if c.voted is None and not c.is_consumed])
    chances = iter(delays.chances(ages)) if ages.size else iter(())
    none = np.zeros(num_records)
    seen = np.zeros(num_records, dtype=bool)
    for completion in known:
        chance = CONSUMED if completion.is_consumed else CERTAIN
        if completion.voted is None and not completion.is_consumed:
            chance = float(next(chances))
        if completion.is_stale:
            chance = 0.0
        records = completion.alive(gen)
        none[records] += np.log1p(-chance)
        seen[records] = True
    return np.where(seen, -np.expm1(none), delays.prior)
