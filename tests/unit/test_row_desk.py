"""The scheduler's row desk: what a trainer holds is given back when another trainer comes, for that one has died."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from scheduler_support import Scheduler
from sglang.srt.mem_cache.radix_cache import RadixCache

from alchemist.protocol import messages

PROMPT = list(range(1, 9))


@pytest.fixture
def scheduler(tmp_path):
    scheduler = Scheduler(str(tmp_path), 400)
    # A cache that remembers nothing: answers find their rows by themselves.
    scheduler.engine.on_requests(loop(RadixCache.create_simulated()), [])
    prompt = scheduler.prefill(len(PROMPT))
    assert prompt.begin()
    prompt.compute()
    scheduler.engine._flush()
    assert scheduler.pool.hedge(100) == len(PROMPT)
    scheduler.pool.finish("a", prompt.slots, len(PROMPT), 0.0)
    yield scheduler
    scheduler.engine.close()


def loop(tree):
    return SimpleNamespace(tree_cache=tree, idle_sleeper=None, ps=SimpleNamespace(tp_rank=0))


def tell(scheduler, peer, message):
    return scheduler.engine._desk.answer(peer, message)


def check_out(scheduler, peer, ticket, token_ids=PROMPT):
    prompt = messages.Prompt(rid="a", extra_key=None, token_ids=messages.pack_ids(token_ids))
    answer = tell(scheduler, peer, messages.CheckOut(ticket=ticket, prompts=[prompt]))
    assert isinstance(answer, messages.CheckedOut)
    assert answer.ticket == ticket
    return answer.places[0]


def readers(scheduler):
    return sorted(scheduler.pool._refs[scheduler.pool._refs > 0].tolist())


def test_a_trainer_gives_back_what_it_took(scheduler):
    assert check_out(scheduler, b"one", 1) is not None
    assert check_out(scheduler, b"one", 2) is not None
    assert readers(scheduler) == [2] * len(PROMPT)
    tell(scheduler, b"one", messages.CheckIn(ticket=1))
    assert readers(scheduler) == [1] * len(PROMPT)
    # Twice, or of nobody: nothing happens.
    tell(scheduler, b"one", messages.CheckIn(ticket=1))
    tell(scheduler, b"one", messages.CheckIn(ticket=7))
    assert readers(scheduler) == [1] * len(PROMPT)
    tell(scheduler, b"one", messages.CheckIn(ticket=2))
    assert readers(scheduler) == []


def test_what_a_dead_trainer_held_is_given_back_when_the_next_one_asks(scheduler):
    for ticket in range(3):
        check_out(scheduler, b"dead", ticket)
    assert readers(scheduler) == [3] * len(PROMPT)
    assert check_out(scheduler, b"next", 0) is not None
    assert readers(scheduler) == [1] * len(PROMPT)
    # A message of the dead one that was still on its way.
    tell(scheduler, b"dead", messages.CheckIn(ticket=1))
    assert readers(scheduler) == [1] * len(PROMPT)
    scheduler.pool.check_integrity()


def test_rows_of_what_was_trained_are_not_waited_for(scheduler):
    tell(scheduler, b"main", messages.Voted(rid="a"))
    assert scheduler.pool.answers.get("a").waits_since is not None
    tell(scheduler, b"main", messages.Trained(rids=["a", "nobody"]))
    assert scheduler.pool.answers.get("a").waits_since is None


def test_short_prompts_are_not_recorded_nor_any_chunk_of_long_ones_left_out(scheduler):
    scheduler.engine.config = dataclasses.replace(scheduler.engine.config, record_min_tokens=8)
    requests = [
        SimpleNamespace(rid=f"{n}", input_ids=[1] * n, sampling_params=None) for n in (7, 8)
    ]
    others = [SimpleNamespace(rid="image", input_ids=None, sampling_params=None), SimpleNamespace()]
    scheduler.engine.on_requests(None, [*requests, *others])
    chunks = []
    for rid in ("7", "8", "image"):
        chunk = scheduler.prefill(4)
        chunk.batch.rids = [rid]
        chunks.append(chunk.begin())
        if chunks[-1]:
            chunk.compute()
    assert chunks == [False, True, True]


def test_answers_of_versions_that_are_too_old_are_not_recorded_any_more(scheduler):
    def is_recorded(lora_id):
        prompt = scheduler.prefill(1)
        prompt.batch.lora_ids = [lora_id]
        if not prompt.begin():
            return False
        prompt.compute()
        return True

    assert tell(scheduler, b"main", messages.Fresh(lora_ids=["", "one"])) is None
    assert [is_recorded(i) for i in (None, "one")] == [True, True]
    tell(scheduler, b"main", messages.Fresh(lora_ids=["one", "two"]))
    # A version that nobody has spoken of is newer than all that somebody has.
    assert [is_recorded(i) for i in (None, "one", "two", "three")] == [False, True, True, True]
    tell(scheduler, b"main", messages.Fresh(lora_ids=["two", "three"]))
    assert [is_recorded(i) for i in ("one", "two")] == [False, True]
    # Somebody has rolled back.
    tell(scheduler, b"main", messages.Fresh(lora_ids=["", "one"]))
    assert [is_recorded(i) for i in (None, "one", "two", "three")] == [True, True, False, False]


def test_when_recording_has_stopped_a_trainer_is_told_that_there_are_no_rows(scheduler):
    check_out(scheduler, b"one", 1)
    scheduler.engine.stop_recording(MemoryError("a test"))
    assert check_out(scheduler, b"one", 2) is None
    tell(scheduler, b"one", messages.CheckIn(ticket=1))
    stats = tell(scheduler, b"one", messages.AskRows(ticket=3))
    assert b"MemoryError: a test" in stats.stats


@pytest.mark.parametrize("asked", [[*PROMPT, 9, 10], PROMPT, PROMPT[:5]], ids=len)
def test_rows_of_a_prompt_are_found_with_or_without_its_answer(scheduler, asked):
    """The trainer asks for prompt and answer, whatever of them was recorded; serving has forgotten both."""
    places = check_out(scheduler, b"one", 1, asked)
    assert places is not None
    rows = np.frombuffer(places.rows, dtype=np.int64)
    known = min(len(asked), len(PROMPT))
    assert rows.size == len(asked)
    assert (rows[:known] >= 0).all()
    assert (rows[known:] == -1).all()
    assert len(set(rows[:known].tolist())) == known


def test_without_a_radix_tree_nothing_is_recorded(tmp_path):
    """Rows are found by it alone."""
    scheduler = Scheduler(str(tmp_path), 400)
    scheduler.engine.on_requests(loop(None), [])
    assert "RadixCache" in scheduler.pool.stopped
    scheduler.engine.close()
