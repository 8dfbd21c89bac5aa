"""What a recorded row is worth: FLOPs it saves per byte and second that it has to be kept for.

All rows of a model have the same bytes, and a token's FLOPs grow with its position (attention), which the pool keeps.
A row is read if a vote on its completion comes, and is trained before the version that served it is too old. How long
both take is estimated from what was seen so far. Time is cut into bins of doubling length; in each the hazard is what
came over what was still waited for: an estimate that treats answers nobody has voted on yet, and votes that still wait,
as what they are, censored (Kaplan and Meier, 1958).

What is most often there when it is read is what is kept by its rate: the chance that it is read within some time, over
the time it takes until then, for the best such time (Gittins' index, 1979). A chance alone would keep old answers,
whose votes are as sure to come and longer in coming, and old votes where training is behind and takes the latest first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

NUM_BINS = 24
"""Up to 1 s, 2 s, 4 s, … and the last one for ever (from 48 days on)."""
_EDGES = np.append(0.0, 2.0 ** np.arange(NUM_BINS))
"""Of the bins, in seconds."""
VOTE_CHANCE, TRAINING_CHANCE, PRIOR_WEIGHT = 0.1, 0.9, 5.0
"""Before anything was seen: one answer in ten is voted on, nine votes in ten are trained in time, half of those within
a second, half of the rest by the end of the next bin, and so on, as if five had taught so. Older ones have less to hope
for, so rows go in the order of their age.
"""
CONSUMED = 1e-9
"""Rate of an answer whose vote was trained: another user may vote on it."""


class Text(NamedTuple):
    """Tokens, and in which namespace of the radix tree they were served: of which version."""

    token_ids: np.ndarray
    """int32."""
    extra_key: str | None

    def shared(self, other: Text) -> int:
        """How many of the first tokens have the same activations in both."""
        if self.extra_key != other.extra_key:
            return 0
        length = min(self.token_ids.size, other.token_ids.size)
        differ = np.flatnonzero(self.token_ids[:length] != other.token_ids[:length])
        return int(differ[0]) if differ.size else length


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
    text: Text | None = None
    """Of the records: a client may use an id twice."""
    voted: float | None = None
    """When its first vote came."""
    is_consumed: bool = False
    is_stale: bool = False
    """Whether it would be computed again all the same, its version being too old."""

    @property
    def is_open(self) -> bool:
        """Whether its first vote may still come."""
        return self.voted is None and not self.is_consumed

    @property
    def waits_since(self) -> float | None:
        """When its vote came, if it is still to be trained from these rows."""
        return None if self.is_consumed or self.is_stale else self.voted

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
        self._prior_at_risk = PRIOR_WEIGHT - np.append(0.0, self._prior.cumsum()[:-1])
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

    def hazards(self, ages: np.ndarray) -> np.ndarray:
        """By bin, the chance that it comes then if it has not before; `ages` as for `rates`. [NUM_BINS]"""
        open_ = np.bincount(bin_of(ages), minlength=NUM_BINS)[::-1].cumsum()[::-1]
        at_risk = self._at_risk + open_ + self._prior_at_risk
        hazards: np.ndarray = np.minimum((self._came + self._prior) / at_risk, 1.0)
        return hazards

    def rates(self, ages: np.ndarray) -> np.ndarray:
        """How soon it may come where it has been waited for for `ages` seconds, in 1/s: see above.

        These count themselves as at risk so far: without them only those for which it came would.
        """
        left = np.append(1.0, (1 - self.hazards(ages)).cumprod())
        waited = np.append(0.0, (np.diff(_EDGES) * (left[1:] + left[:-1]) / 2).cumsum())
        # From every edge to every later one.
        came = left[:, None] - left
        seconds = waited - waited[:, None]
        index = np.divide(came, seconds, out=np.zeros_like(came), where=seconds > 0).max(1)
        # Nothing is known of what lies beyond the last bin.
        index[-1] = index[-2]
        found: np.ndarray = np.interp(ages, _EDGES, index)
        return found


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
) -> tuple[np.ndarray, float]:
    """By record, the rate at which it is read for the completions that have it, in 1/s: float64 [num_records]. And the
    rate of an answer at its beginning: that of records of no completion, whose answers are still being written.

    Args:
        votes: after answers.
        trainings: after votes.
    """
    known = list(completions)
    open_ = np.array([now - c.finished for c in known if c.is_open])
    waiting = np.array([now - c.waits_since for c in known if c.waits_since is not None])
    # Of votes to come without those that wait: where training is behind they would make new answers worth so little
    # that old votes stay, and half as many rows are there when a vote comes (docs/log.md).
    (training,) = trainings.rates(np.zeros(1))
    # The last one is an answer that begins now.
    *open_rates, first = together(votes.rates(np.append(open_, 0.0)), training)
    for_reading, for_training = iter(open_rates), iter(trainings.rates(waiting))
    rates = np.zeros(num_records)
    seen = np.zeros(num_records, dtype=bool)
    for completion in known:
        rate = CONSUMED
        if completion.is_open:
            rate = float(next(for_reading))
        elif completion.waits_since is not None:
            rate = float(next(for_training))
        records = completion.alive(gen)
        rates[records] += 0.0 if completion.is_stale else rate
        seen[records] = True
    return np.where(seen, rates, first), float(first)


def together(first: Any, then: float) -> Any:
    """Rate of one thing after another: their times add up."""
    return first * then / (first + then)
