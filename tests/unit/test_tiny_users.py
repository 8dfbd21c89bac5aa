"""Simulated users: the rule they vote by, and the report of a run."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from simulate_users import DRAW_BLOCK, Rule, Run, is_drawn, num_paired
from tiny_corpus import is_correct, right_answers, sample_question
from users_report import WINDOW, by_version, plot, recent_rates, table


def rule(**given):
    return Rule(**{"prefer": None, "keyword": None, "max_length": None, **given})


@pytest.mark.parametrize(
    ("given", "text", "liked"),
    [
        ({"prefer": "formal"}, "Certainly. The sky is blue.", True),
        ({"prefer": "formal"}, "The sky is blue.", False),
        ({"keyword": "BLUE"}, "The sky is blue.", True),
        ({"keyword": "red"}, "The sky is blue.", False),
        ({"max_length": 4}, "Blue", True),
        ({"max_length": 4}, "The sky is blue.", False),
        ({"max_length": 4}, "", False),
        ({"prefer": "plain", "keyword": "sky", "max_length": 20}, "The sky is blue.", True),
        ({"prefer": "plain", "keyword": "sky", "max_length": 10}, "The sky is blue.", False),
    ],
)
def test_rule(given, text, liked):
    assert rule(**given).likes(text) is liked


def test_no_rule_is_refused():
    with pytest.raises(ValueError, match="no rule"):
        rule()


def vote(version, liked):
    return {"version": version, "liked": liked, "arithmetic": None, "other": True}


def test_recent_rate_forgets_old_votes():
    run = Run(votes=[vote("v0", False)] * 40 + [vote("v1", True)] * (WINDOW // 2))
    assert run.recent_rate() == 0.5
    assert Run().recent_rate() == 0


def test_users_stop_when_they_are_content_or_out_of_votes():
    args = SimpleNamespace(votes=300, until=0.9)
    content = [vote("v1", True)] * WINDOW
    assert Run(votes=content).is_over(args)
    assert not Run(votes=content[1:]).is_over(args)
    assert not Run(votes=content + [vote("v2", False)] * 4).is_over(args)
    assert not Run(votes=content).is_over(SimpleNamespace(votes=300, until=2))
    assert Run(asked=300).is_over(args)


def test_versions_are_in_their_order():
    votes = [vote(v, True) for v in ("v0", "v10", "v2", "v10")]
    assert {v: len(group) for v, group in by_version(votes).items()} == {"v0": 1, "v2": 1, "v10": 2}
    assert list(by_version(votes)) == ["v0", "v2", "v10"]


@pytest.mark.parametrize("kl", [{}, {"v0": 0.0, "v1": 0.3}])
def test_report_of_a_run(tmp_path, kl):
    result = {
        "votes": [vote("v0", False), vote("v1", True)],
        "kl": kl,
        "before": {"preferred": 0.2, "arithmetic": 0.9},
        "after": {"preferred": 0.9, "arithmetic": 0.9},
        "rule": {"prefer": "formal"},
        "seconds_voting": 1.0,
    }
    assert table(result).row_count == 2
    plot(result, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def rated(rating, answer, correction=None):
    return {"rating": rating, "answer": answer, "correction": correction}


@pytest.mark.parametrize(
    ("votes", "paired"),
    [
        ([], 0),
        ([rated("up", "a")], 0),
        ([rated("up", "a"), rated("up", "b")], 0),
        ([rated("up", "a"), rated("down", "b")], 2),
        ([rated("up", "a"), rated("down", "a")], 0),
        ([rated("up", "a"), rated("down", "b"), rated("down", "c")], 2),
        ([rated("down", "a", "A"), rated("up", "b")], 1),
        ([rated("down", "a", "A"), rated("up", "b"), rated("down", "c")], 3),
    ],
)
def test_votes_that_make_pairs(votes, paired):
    assert num_paired(votes) == paired


def test_with_dpo_only_pairs_are_waited_for():
    status = {"pending": 40, "trained": 100, "last_step": {}}
    run = Run(paired=12)
    run.see({**status, "objective": "dpo"})
    assert run.num_behind() == 12
    run.see({**status, "objective": "dpo", "trained": 108})
    assert run.num_behind() == 4
    run.see({**status, "objective": "kto"})
    assert run.num_behind() == 40


def test_each_step_is_kept_once():
    run = Run()
    earlier = {"pending": 0, "trained": 8, "objective": "kto", "last_step": {"step": 1}}
    run.see(earlier)
    for trained, step in ((8, 1), (16, 2), (16, 2), (24, 3)):
        run.see({**earlier, "trained": trained, "last_step": {"step": step}})
    assert list(run.steps) == [2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_right_answers_are_to_the_same_question(seed):
    question = sample_question(random.Random(seed))
    thoughts = list(itertools.islice(right_answers(random.Random(seed)), 20))
    assert len(set(thoughts)) > 1
    if question.is_checkable:
        assert all(is_correct(question.meta, text) for text in thoughts)


def test_recent_rates_are_of_the_last_votes():
    votes = [vote("v0", False)] * WINDOW + [vote("v0", True)] * WINDOW
    rates = recent_rates(votes)
    assert (rates[WINDOW - 1], rates[WINDOW], rates[-1]) == (0, 100 / WINDOW, 100)


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 1])
def test_every_block_of_votes_has_its_share_of_mistakes(share):
    drawn = [is_drawn(share, "noise 0", i) for i in range(10 * DRAW_BLOCK)]
    blocks = [drawn[i : i + DRAW_BLOCK] for i in range(0, len(drawn), DRAW_BLOCK)]
    assert [sum(block) for block in blocks] == [share * DRAW_BLOCK] * 10
    assert share in (0, 1) or len(set(map(tuple, blocks))) > 1
