"""The chance that a vote still comes: what it is estimated from, and what rows are worth by it."""

import numpy as np
import pytest

from alchemist.server.appraisal import (
    CERTAIN,
    CONSUMED,
    NUM_BINS,
    Completion,
    FeedbackDelays,
    bin_of,
    worth,
)


def test_bins_double():
    delays = np.array([0.0, 0.9, 1.0, 1.9, 2.0, 4.0, 7.9, 1e12])
    assert bin_of(delays).tolist() == [0, 0, 1, 1, 2, 3, 3, NUM_BINS - 1]


def test_before_anything_was_seen_older_answers_have_less_to_hope_for():
    chances = FeedbackDelays().chances(np.array([0.0, 10.0, 1e3, 1e6]))
    assert (np.diff(chances) < 0).all()
    assert chances[-1] > 0
    assert FeedbackDelays().prior == pytest.approx(0.075, abs=0.01)


def test_votes_that_come_at_once_or_never():
    """Half of two thousand answers are voted on within four seconds, the rest is given up after a day."""
    delays = FeedbackDelays()
    draw = np.random.default_rng(0)
    for delay in draw.uniform(0, 4, 1000):
        delays.came(float(delay))
    for _ in range(1000):
        delays.left(86_400.0)
    young, old = delays.chances(np.array([0.0, 60.0]))
    # Of the first bin, half is behind an answer of no age: some of its votes have come.
    assert young == pytest.approx(0.45, abs=0.06)
    assert old < 0.05


def test_answers_without_a_vote_yet_count():
    """A hundred answers were voted on; nine hundred are as old and were not: one in ten, not all."""
    delays = FeedbackDelays()
    for _ in range(100):
        delays.came(0.5)
    assert delays.chances(np.zeros(1))[0] > 0.5
    ages = np.append(np.full(900, 30.0), 0.0)
    assert delays.chances(ages)[-1] < 0.2


def test_a_row_is_worth_what_its_answers_are_together():
    gen = np.array([0, 0, 7, 0, 0])
    delays = FeedbackDelays()
    voted = Completion(np.array([0, -1]), np.array([0, 0]), finished=0.0, voted=1.0)
    trained = Completion(np.array([1, 2]), np.array([0, 6]), 0.0, voted=1.0, is_consumed=True)
    open_ = [Completion(np.array([3, 1]), np.array([0, 0]), finished=0.0) for _ in range(2)]
    found = worth([voted, trained, *open_], gen, delays, now=10.0, num_records=5)
    one = delays.chances(np.array([10.0, 10.0]))[0]
    assert found[0] == pytest.approx(CERTAIN)
    assert found[1] == pytest.approx(1 - (1 - CONSUMED) * (1 - one) ** 2)
    assert found[3] == pytest.approx(1 - (1 - one) ** 2)
    # Record 2 is another token's by now, 4 is of an answer that is being written.
    assert found[2] == found[4] == delays.prior
