"""The chances that a vote comes and is trained in time: what they are estimated from, what rows are worth by them."""

import numpy as np
import pytest

from alchemist.server.answers import Answers
from alchemist.server.appraisal import (
    CONSUMED,
    NUM_BINS,
    TRAINING_CHANCE,
    VOTE_CHANCE,
    Completion,
    Delays,
    bin_of,
    worth,
)


def test_bins_double():
    delays = np.array([0.0, 0.9, 1.0, 1.9, 2.0, 4.0, 7.9, 1e12])
    assert bin_of(delays).tolist() == [0, 0, 1, 1, 2, 3, 3, NUM_BINS - 1]


def test_before_anything_was_seen_older_answers_have_less_to_hope_for():
    chances = Delays(VOTE_CHANCE).chances(np.array([0.0, 10.0, 1e3, 1e6]))
    assert (np.diff(chances) < 0).all()
    assert chances[-1] > 0
    assert Delays(VOTE_CHANCE).prior == pytest.approx(0.075, abs=0.01)


def test_votes_that_come_at_once_or_never():
    """Half of two thousand answers are voted on within four seconds, the rest is given up after a day."""
    delays = Delays(VOTE_CHANCE)
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
    delays = Delays(VOTE_CHANCE)
    for _ in range(100):
        delays.came(0.5)
    assert delays.chances(np.zeros(1))[0] > 0.5
    ages = np.append(np.full(900, 30.0), 0.0)
    assert delays.chances(ages)[-1] < 0.2


def test_a_row_is_worth_what_its_answers_are_together():
    gen = np.array([0, 0, 7, 0, 0])
    votes, trainings = Delays(VOTE_CHANCE), Delays(TRAINING_CHANCE)
    voted = Completion(np.array([0, -1]), np.array([0, 0]), finished=0.0, voted=1.0)
    trained = Completion(np.array([1, 2]), np.array([0, 6]), 0.0, voted=1.0, is_consumed=True)
    open_ = [Completion(np.array([3, 1]), np.array([0, 0]), finished=0.0) for _ in range(2)]
    known = [voted, trained, *open_]
    found = worth(known, gen, votes, trainings, now=10.0, num_records=5)
    one = votes.chances(np.array([10.0, 10.0]))[0] * trainings.prior
    assert found[0] == pytest.approx(trainings.chances(np.array([9.0]))[0])
    assert found[1] == pytest.approx(1 - (1 - CONSUMED) * (1 - one) ** 2)
    assert found[3] == pytest.approx(1 - (1 - one) ** 2)
    # Record 2 is another token's by now, 4 is of an answer that is being written.
    assert found[2] == found[4] == votes.prior * trainings.prior


def values(answers, now):
    """What each completion's only record is worth, by id, in the order in which they came."""
    found = answers.chances(now)
    return dict(zip("abcdef", found, strict=False))


def answers_of(count):
    answers = Answers(np.zeros(count, np.int64))
    for record, rid in enumerate("abcdef"[:count]):
        answers.add(rid, np.array([record]), float(record), "v1")
    return answers


def test_where_training_keeps_up_a_vote_is_as_good_as_read():
    answers = answers_of(6)
    for step in range(40):
        answers.voted("a", 10.0 + step)
        answers.consumed("a", 12.0 + step)
        answers.drop("a", 13.0 + step)
        answers.add("a", np.array([0]), 14.0 + step, "v1")
    answers.voted("b", 60.0)
    worths = values(answers, 60.5)
    assert worths["b"] > 0.9 > worths["c"]


def test_where_training_is_behind_an_old_vote_is_worth_less_than_a_young_answer():
    """Every answer is voted on after five seconds, and one vote in ten is trained, at once: the others grow too old."""
    answers = answers_of(6)
    for step in range(100):
        now = 100.0 * step
        answers.add("a", np.array([0]), now, f"v{step}")
        answers.voted("a", now + 5)
        if step % 10 == 0:
            answers.consumed("a", now + 6)
        answers.keep_fresh([f"v{step}"], now + 50)
        answers.keep_fresh([f"v{step + 1}"], now + 99)
        answers.drop("a", now + 99)
    now = 1e4
    answers.keep_fresh(["v1"], now)
    answers.add("b", np.array([1]), now - 70, "v1")
    answers.voted("b", now - 65)
    answers.add("c", np.array([2]), now - 1, "v1")
    worths = values(answers, now)
    assert 0 < worths["b"] < worths["c"] < 0.2
