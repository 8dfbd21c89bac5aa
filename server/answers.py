"""Answers that may still be voted on, and the records of their prompts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from alchemist.server.appraisal import (
    TRAINING_CHANCE,
    VOTE_CHANCE,
    Completion,
    Delays,
    Text,
    worth,
)
from alchemist.server.ids import Ids

NUM_EARLY = 1024
"""Votes on answers that have not ended, or of which nothing is known any more: no more than this are kept."""


class Answers:
    """Completions by id, and how many of them want each record.

    Attributes:
        gen: [records] borrowed: a record's generation, which changes when the record ends.
        wants: [records] how many completions want each record.
    """

    def __init__(self, gen: Ids) -> None:
        self._gen = gen
        self.wants = np.zeros_like(gen)
        self._votes, self._trainings = Delays(VOTE_CHANCE), Delays(TRAINING_CHANCE)
        self._completions: dict[str, Completion] = {}
        self._early: dict[str, None] = {}
        """Completions that were voted on before they had ended, the oldest first."""
        self._fresh = frozenset({""})
        self._known = {""}
        self._num_tokens = 0
        self.num_voted_tokens = 0
        """Tokens of completions that were voted on, and how many of them had a row when the vote came."""
        self.num_voted_held = 0

    def __len__(self) -> int:
        return len(self._completions)

    def get(self, rid: str) -> Completion | None:
        return self._completions.get(rid)

    def is_fresh(self, served_by: str) -> bool:
        """Whether the trainer would take rows of the adapter's answers. Of one it has never heard of it will: a new
        version may answer before this is told.
        """
        return served_by in self._fresh or served_by not in self._known

    def keep_fresh(self, adapters: Iterable[str], now: float) -> None:
        """Of the adapters known so far the trainer would take rows of these ones' answers only; "": the base model."""
        self._fresh = frozenset(adapters)
        self._known |= self._fresh
        for completion in self._completions.values():
            is_stale = not self.is_fresh(completion.served_by)
            if is_stale and completion.waits_since is not None:
                self._trainings.left(now - completion.waits_since)
            completion.is_stale = is_stale

    def add(
        self, rid: str, records: Ids, now: float, served_by: str, text: Text | None = None
    ) -> Ids:
        """A request has ended with `records`, −1 where a token has none. Records that nobody wants any more, because
        what is remembered is bounded by what records there are.
        """
        unwanted = [self.drop(rid, now)]
        self.wants[records[records >= 0]] += 1
        completion = Completion(records, self._gen[records], now, served_by, text)
        completion.is_stale = not self.is_fresh(served_by)
        self._completions[rid] = completion
        self._num_tokens += records.size
        if rid in self._early:
            del self._early[rid]
            self.voted(rid, now)
        while self._num_tokens > 4 * self._gen.size and len(self._completions) > 1:
            unwanted.append(self.drop(next(iter(self._completions)), now))
        return np.concatenate(unwanted)

    def voted(self, rid: str, now: float) -> None:
        completion = self._completions.get(rid)
        if completion is None:
            self._early[rid] = None
            if len(self._early) > NUM_EARLY:
                del self._early[next(iter(self._early))]
        elif completion.is_open:
            completion.voted = now
            self._votes.came(now - completion.finished)
            self.num_voted_tokens += completion.records.size
            self.num_voted_held += completion.alive(self._gen).size

    def consumed(self, rid: str, now: float) -> None:
        completion = self._completions.get(rid)
        if completion is not None:
            if completion.waits_since is not None:
                self._trainings.came(now - completion.waits_since)
            completion.is_consumed = True

    def drop(self, rid: str, now: float) -> Ids:
        """Forget a completion; the records that nobody wants any more."""
        completion = self._completions.pop(rid, None)
        if completion is None:
            return np.arange(0)
        if completion.is_open:
            self._votes.left(now - completion.finished)
        elif completion.waits_since is not None:
            self._trainings.left(now - completion.waits_since)
        self._num_tokens -= completion.records.size
        records = completion.alive(self._gen)
        self.wants[records] -= 1
        unwanted: Ids = records[self.wants[records] == 0]
        return unwanted

    def rates(self, now: float) -> tuple[np.ndarray, float]:
        """By record, what it is worth by all completions that have it; and what one is of an answer that begins now."""
        every = self._completions.values()
        return worth(every, self._gen, self._votes, self._trainings, now, self._gen.size)

    def count_wants(self) -> Ids:
        """`wants`, from scratch."""
        wants = np.zeros_like(self.wants)
        for completion in self._completions.values():
            wants[completion.alive(self._gen)] += 1
        return wants
