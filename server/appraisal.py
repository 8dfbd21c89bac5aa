"""What a recorded row is worth: FLOPs it saves per byte × the chance that it will be read.

All rows of a model have the same bytes, and a token's FLOPs grow with its position (attention), which the pool keeps.
A row is read if a vote on its completion comes, and is trained before the version that served it is too old. Both
chances are estimated from the delays seen so far, of votes after answers and of training after votes. Time is cut into
bins of doubling length; in each the hazard is what came over what was still waited for: an estimate that treats answers
nobody has voted on yet, and votes that still wait, as what they are, censored (Kaplan and Meier, 1958). Where training
keeps up, a vote is as good as read; where it is behind, and takes the latest first, an old vote is worth little.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

NUM_BINS = 24
"""Up to 1 s, 2 s, 4 s, … and the last one for ever (97 days on)."""
VOTE_CHANCE, TRAINING_CHANCE, PRIOR_WEIGHT = 0.1, 0.9, 5.0
"""Before anything was seen: one answer in ten is voted on, nine votes in ten are trained in time, half of those within
a second, half of the rest within two more, and so on, as if five had taught so. Older ones have less to hope for, so
rows go in the order of their age.
"""
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
    """When its first vote came."""
    is_consumed: bool = False
    is_stale: bool = False
    """Whether it would be computed again all the same, its version being too old."""

    @property
    def is_waiting(self) -> bool:
        """Whether a vote on it waits to be trained from its rows."""
        return self.voted is not None and not self.is_consumed and not self.is_stale

    def is_alive(self, gen: np.ndarray) -> np.ndarray:
        """Which of `records` are still its own: bool."""
        alive: np.ndarray = (self.records >= 0) & (gen[self.records] == self.gens)
        return alive

    def alive(self, gen: np.ndarray) -> np.ndarray:
        alive: np.ndarray = self.records[self.is_alive(gen)]
        return alive


class Delays:
    """How long after something what is waited for comes, if it comes."""

    def __init__(self, chance: float) -> None:
        """Args:
        chance: that it comes, before anything was seen; some of that is lost to the bins, which end.
        """
        self._prior = PRIOR_WEIGHT * chance * 0.5 ** (1 + np.arange(NUM_BINS))
        self._came = np.zeros(NUM_BINS)
        self._at_risk = np.zeros(NUM_BINS)

    def came(self, delay: float) -> None:
        """It came, `delay` seconds later."""
        last = int(bin_of(np.array([delay]))[0])
        self._came[last] += 1
        self._at_risk[: last + 1] += 1

    def left(self, age: float) -> None:
        """It has not come, and is no longer waited for."""
        self._at_risk[: int(bin_of(np.array([age]))[0]) + 1] += 1

    def chances(self, ages: np.ndarray) -> np.ndarray:
        """Chance that it still comes where it has been waited for for `ages` seconds.

        These count themselves as at risk so far: without them only those for which it came would.
        """
        bins = bin_of(ages)
        open_ = np.bincount(bins, minlength=NUM_BINS)[::-1].cumsum()[::-1]
        hazard = (self._came + self._prior) / (self._at_risk + open_ + PRIOR_WEIGHT)
        survival = np.append((1 - np.minimum(hazard, 1.0))[::-1].cumprod()[::-1], 1.0)
        # Of the bin that one is in, half is behind it.
        within = np.sqrt(survival[bins] * survival[bins + 1])
        chances: np.ndarray = 1 - within
        return chances

    @property
    def prior(self) -> float:
        """The chance at the beginning."""
        return float(self.chances(np.zeros(1))[0])


def bin_of(delays: np.ndarray) -> np.ndarray:
    """Bin of each delay in seconds: 0 below 1 s, 1 below 2 s, 2 below 4 s, …"""
    bins = np.floor(np.log2(np.maximum(delays, 0.5))).astype(np.int64) + 1
    clipped: np.ndarray = np.clip(bins, 0, NUM_BINS - 1)
    return clipped


def worth(
    completions: Iterable[Completion],
    gen: np.ndarray,
    votes: Delays,
    trainings: Delays,
    now: float,
    num_records: int,
) -> np.ndarray:
    """Chance, by record, that it will be read for some completion that has it: float64 [num_records]. Records of no
    completion, whose answers are still being written, get the prior.

    Args:
        votes: after answers.
        trainings: after votes.
    """
    known = list(completions)
    open_ = np.array([now - c.finished for c in known if c.voted is None])
    waiting = np.array([now - c.voted for c in known if c.is_waiting and c.voted is not None])
    for_votes, for_trainings = iter(votes.chances(open_)), iter(trainings.chances(waiting))
    prior = trainings.prior
    none = np.zeros(num_records)
    seen = np.zeros(num_records, dtype=bool)
    for completion in known:
        chance = CONSUMED
        if completion.voted is None:
            chance = prior * float(next(for_votes))
        elif completion.is_waiting:
            chance = float(next(for_trainings))
        if completion.is_stale:
            chance = 0.0
        records = completion.alive(gen)
        none[records] += np.log1p(-chance)
        seen[records] = True
    return np.where(seen, -np.expm1(none), votes.prior * prior)
