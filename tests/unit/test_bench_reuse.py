"""The replayed chat trace: what is said when, when votes come, and which of them are counted."""

from __future__ import annotations

import random
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from bench_reuse import Voted, row_name, share, share_row, steady
from chat_trace import LogNormal, Turn, build, read_questions
from reuse_figure import by_delay, plot

DELAY = LogNormal(60, 1.0, 600)
QUESTIONS = [[f"first {i}", f"second {i}"] for i in range(7)]


def trace(**changes):
    options = {
        "length_s": 7200,
        "chats_per_minute": 6,
        "questions_per_chat": 2,
        "think": LogNormal(20, 0.5, 100),
        "delay": DELAY,
        "vote_share": 0.5,
        "seed": 0,
    }
    return build(QUESTIONS, **(options | changes))


def voted(delay_s=10.0, planned_s=0.0, recorded=50, user="a"):
    return Voted(user, Turn("hi", 0.0, planned_s, delay_s, "up"), 100, recorded)


def test_delays_are_log_normal_below_the_longest():
    rng = random.Random(3)
    uncut = [LogNormal(60, 1.0, 1e9).draw(rng) for _ in range(4000)]
    assert statistics.median(uncut) == pytest.approx(60, rel=0.1)
    # One sigma up is e times the median.
    above = sum(value > 60 * 2.718281828 for value in uncut) / len(uncut)
    assert above == pytest.approx(0.1587, abs=0.02)
    cut = [DELAY.draw(rng) for _ in range(4000)]
    assert max(cut) <= 600


def test_trace_is_of_its_seed_and_rate():
    found = trace()
    assert found == trace()
    assert found != trace(seed=1)
    # 720 expected, Poisson.
    assert len(found) == pytest.approx(720, abs=110)
    assert all(0 < a.start_s < b.start_s < 7200 for a, b in pairwise(found))
    assert len({chat.user for chat in found}) == len(found)
    votes = [turn.rating for chat in found for turn in chat.turns]
    assert {None, "up", "down"} == set(votes)
    assert votes.count(None) / len(votes) == pytest.approx(0.5, abs=0.05)


def test_turns_are_whole_questions_in_order_and_planned():
    for chat in trace():
        texts = [turn.text for turn in chat.turns]
        assert len(texts) == 4
        for i in (0, 2):
            assert texts[i].replace("first", "second") == texts[i + 1]
        now = chat.start_s
        for turn in chat.turns:
            now += turn.think_s
            assert turn.planned_s == pytest.approx(now)
        assert chat.turns[0].think_s == 0


def test_all_questions_are_asked_before_one_comes_again():
    asked = [chat.turns[0].text for chat in trace(questions_per_chat=1)]
    assert len(set(asked[:7])) == 7


def test_questions_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question_id": 1, "turns": ["a", "b"]}\n{"turns": ["c"]}\n')
    assert read_questions(path) == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    "line", ["[1]", '{"turns": []}', '{"turns": ["a", 1]}', '{"turn": ["a"]}', "nonsense", "{}"]
)
def test_a_wrong_line_is_named(tmp_path, line):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"turns": ["a"]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"questions\.jsonl:2"):
        read_questions(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no question"):
        read_questions(path)


def test_only_steady_load_is_counted_whatever_the_delay():
    at = [0, 99, 100, 250, 400, 401]
    found = steady((voted(planned_s=s, delay_s=s) for s in at), load_s=500, longest_s=100)
    assert [vote.turn.planned_s for vote in found] == [100, 250, 400]


def test_share_is_of_prompt_tokens():
    votes = [voted(recorded=100, user="a"), voted(recorded=0, user="b"), voted(user="c")]
    assert share(votes) == 0.5
    row = share_row(row_name("reuse_share", 0.25, "value", is_first=True), votes)
    assert (row.name, row.value, row.n) == ("reuse_share_0.25", 0.5, 3)
    assert 0 <= row.spread[0] < 0.5 < row.spread[1] <= 1
    assert row_name("reuse_share", 2.0, "lru", is_first=False) == "reuse_share_2_lru"


def test_curve_by_delay():
    votes = [voted(delay_s=d, recorded=100 - d) for d in (40, 10, 30, 20)]
    assert by_delay(votes, bins=2) == [(15, 0.85), (35, 0.65)]
    # One vote more than the bins divide.
    assert len(by_delay([*votes, voted(delay_s=50)], bins=2)) == 2


def test_plot_of_two_policies(tmp_path):
    votes = [voted(delay_s=d, recorded=100 - d) for d in range(1, 40)]
    points = [(0.0, 0.2, votes), (0.5, 0.8, votes)]
    plot({"value": points, "lru": points}, DELAY, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
