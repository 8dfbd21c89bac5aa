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
    together,
    worth,
)


def test_bins_double():
    delays = np.array([0.0, 0.9, 1.0, 1.9, 2.0, 4.0, 7.9, 1e12])
    assert bin_of(delays).tolist() == [0, 0, 1, 1, 2, 3, 3, NUM_BINS - 1]


def test_before_anything_was_seen_older_answers_have_less_to_hope_for():
    rates = Delays(VOTE_CHANCE).rates(np.array([0.0, 10.0, 1e3, 1e6]))
    assert (np.diff(rates) < 0).all()
    assert rates[-1] > 0


def seen(delays, given_up=(), chance=VOTE_CHANCE):
    found = Delays(chance)
    for delay in delays:
        found.came(float(delay))
    for age in given_up:
        found.left(age)
    return found


def test_votes_that_come_at_once_or_never():
    """Half of two thousand answers are voted on within four seconds, the rest is given up after a day."""
    draw = np.random.default_rng(0)
    delays = seen(draw.uniform(0, 4, 1000), [86_400.0] * 1000)
    young, old = delays.rates(np.array([0.0, 60.0]))
    # Half of them, for which 0.5 · 2 s + 0.5 · 4 s are waited.
    assert young == pytest.approx(0.5 / 3, rel=0.2)
    assert old < young / 1000


def test_votes_that_all_take_a_minute():
    """An answer of no age has as long to wait as a vote takes, one of half a minute less."""
    delays = seen(np.random.default_rng(0).uniform(60, 64, 1000))
    new, old, forgotten = delays.rates(np.array([0.0, 32.0, 600.0]))
    assert new == pytest.approx(1 / 60, rel=0.4)
    assert old > 2 * new
    assert forgotten < new


def test_of_votes_that_are_all_sure_to_come_the_soonest_counts():
    """Log-normal delays, as of people: an answer that has waited for long has long to wait still."""
    delays = seen(np.random.default_rng(0).lognormal(np.log(6), 1.5, 2000))
    new, old = delays.rates(np.array([5.0, 200.0]))
    assert new > 5 * old


def test_answers_without_a_vote_yet_count():
    """A hundred answers were voted on; nine hundred are as old and were not: one in ten, not all."""
    delays = seen([0.5] * 100)
    alone = delays.rates(np.zeros(1))[0]
    ages = np.append(np.full(900, 30.0), 0.0)
    assert delays.rates(ages)[-1] < alone / 5


def test_times_add_up():
    assert together(1 / 20, 1 / 60) == pytest.approx(1 / 80)


def test_a_row_is_worth_what_its_answers_are_together():
    gen = np.array([0, 0, 7, 0, 0])
    votes, trainings = Delays(VOTE_CHANCE), Delays(TRAINING_CHANCE)
    voted = Completion(np.array([0, -1]), np.array([0, 0]), finished=0.0, voted=1.0)
    trained = Completion(np.array([1, 2]), np.array([0, 6]), 0.0, voted=1.0, is_consumed=True)
    stale = Completion(np.array([3]), np.array([0]), finished=0.0, is_stale=True)
    open_ = [Completion(np.array([3, 1]), np.array([0, 0]), finished=0.0) for _ in range(2)]
    known = [voted, trained, stale, *open_]
    found, first = worth(known, gen, votes, trainings, now=10.0, num_records=5)
    # One vote waits, three answers do, and one more begins.
    (waiting,), (training,) = trainings.rates(np.array([9.0])), trainings.rates(np.zeros(1))
    *_, one, new = together(votes.rates(np.array([10.0] * 3 + [0.0])), training)
    assert found[0] == pytest.approx(waiting)
    assert found[1] == pytest.approx(CONSUMED + 2 * one)
    assert found[3] == pytest.approx(2 * one)
    # Record 2 is another token's by now, 4 is of an answer that is being written.
    assert found[2] == found[4] == first == pytest.approx(new)


def values(answers, now):
    """What each completion's only record is worth, by id, in the order in which they came."""
    found, _ = answers.rates(now)
    return dict(zip("abcdef", found, strict=False))


def answers_of(count):
    answers = Answers(np.zeros(count, np.int64))
    for record, rid in enumerate("abcdef"[:count]):
        answers.add(rid, np.array([record]), float(record), "v1")
    return answers


def test_where_training_keeps_up_a_vote_is_worth_most():
    answers = answers_of(6)
    for step in range(40):
        answers.voted("a", 10.0 + step)
        answers.consumed("a", 12.0 + step)
        answers.drop("a", 13.0 + step)
        answers.add("a", np.array([0]), 14.0 + step, "v1")
    answers.voted("b", 60.0)
    worths = values(answers, 60.5)
    assert worths["b"] > 5 * worths["c"] > 0


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
    assert 0 < worths["b"] < worths["c"]


def test_answers_that_nobody_votes_on_make_new_ones_worth_less():
    """Also before any of them is forgotten."""
    few, many = Answers(np.zeros(1, np.int64)), Answers(np.zeros(100, np.int64))
    for record in range(100):
        many.add(str(record), np.array([record]), 0.0, "v1")
    assert many.rates(1e5)[1] < few.rates(1e5)[1] / 5


def test_a_vote_that_came_before_its_answer_had_ended_is_one():
    answers = answers_of(2)
    answers.voted("c", 1.5)
    assert answers.num_voted_tokens == 0
    answers.add("c", np.array([1]), 2.0, "v1")
    assert answers.num_voted_tokens == answers.num_voted_held == 1
    assert answers.get("c").waits_since == 2.0


def test_an_answer_that_was_trained_is_worth_next_to_nothing_whether_its_vote_was_seen_or_not():
    answers = answers_of(2)
    before = values(answers, 5.0)
    answers.consumed("a", 5.0)
    after = values(answers, 5.0)
    assert after["a"] == CONSUMED < before["a"]


@pytest.mark.parametrize("chance", [VOTE_CHANCE, TRAINING_CHANCE])
def test_before_anything_was_seen_it_comes_with_the_chance_that_was_given(chance):
    """With that chance within a day, half as often within the first second: see the module's constants."""
    delays = Delays(chance)
    day = 17
    hazard = delays.hazards(np.zeros(0))
    assert 1 - (1 - hazard[:day]).prod() == pytest.approx(chance, rel=1e-4)
    assert hazard[0] == pytest.approx(chance / 2)
