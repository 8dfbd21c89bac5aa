"""Durability of the ledger's file: one owner, grouping, full disks, damage, kill -9."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from ledger_support import completion, vote

from alchemist.server import errors
from alchemist.server.errors import (
    LedgerCorrupt,
    LedgerFull,
    LedgerLocked,
    LedgerUnavailable,
    NotFound,
)
from alchemist.server.ledger import Ledger
from alchemist.server.records import Completion, Vote


def test_one_process_owns_a_data_directory(ledger: Ledger) -> None:
    with pytest.raises(LedgerLocked, match="in use by another server"):
        Ledger(ledger.directory / "ledger.sqlite3")
    assert vote_survives(ledger)


def vote_survives(ledger: Ledger) -> bool:
    ledger.add_completion(completion("after"))
    return vote(ledger, "after")[1]


def test_files_are_private(ledger: Ledger) -> None:
    vote_survives(ledger)
    assert stat.S_IMODE(ledger.directory.stat().st_mode) == 0o700
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in ledger.directory.iterdir()}
    assert set(modes) >= {"ledger.sqlite3", "ledger.sqlite3-wal", "lock"}
    assert set(modes.values()) == {0o600}


def set_page_limit(ledger: Ledger, pages: int) -> None:
    ledger._store.write(lambda db: db.execute(f"PRAGMA max_page_count={pages}").fetchone()).result()


def test_a_full_disk_fails_the_vote_and_not_the_ledger(ledger: Ledger) -> None:
    ledger.add_completion(completion("before"))
    set_page_limit(ledger, 1)
    with pytest.raises(LedgerFull, match="no space left for"):
        vote(ledger, "before", comment="x" * 100_000)
    # A large completion that does not fit is kept in memory, and written with its first vote.
    large = completion("large", prompt_ids=list(range(50_000)))
    with pytest.raises(LedgerFull):
        ledger.add_completion(large).result()
    assert ledger.num_unsaved_completions == 1
    with pytest.raises(LedgerFull):
        vote(ledger, "large")
    set_page_limit(ledger, 1_000_000)
    assert vote(ledger, "large")[0].state == "pending"
    assert ledger.get_completion("large").result().prompt_ids == large.prompt_ids
    assert vote(ledger, "before")[1]


@pytest.mark.parametrize("then", ["another vote", "another answer"])
def test_a_vote_given_while_streaming_outlives_a_full_disk(ledger: Ledger, then: str) -> None:
    ledger.mark_streaming("large")
    assert vote(ledger, "large")[0].state == "waiting"
    set_page_limit(ledger, 1)
    with pytest.raises(LedgerFull):
        ledger.add_completion(completion("large", prompt_ids=list(range(50_000)))).result()
    set_page_limit(ledger, 1_000_000)
    if then == "another vote":
        assert vote(ledger, "large", user="u")[0].state == "pending"
    else:
        ledger.add_completion(completion("small"))
    num_votes = 2 if then == "another vote" else 1
    deadline = time.monotonic() + 10
    while ledger.is_open("large") or ledger.count("pending").result() < num_votes:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ledger.count("waiting").result() == 0
    assert len(ledger.get_completion("large").result().prompt_ids) == 50_000
    assert ledger.num_unsaved_completions == 1


def test_one_bad_operation_does_not_take_its_group_down(ledger: Ledger) -> None:
    ledger.add_completion(completion())
    set_page_limit(ledger, 1)
    hold = threading.Event()
    ledger._store.write(lambda db: hold.wait(10))
    small = ledger.put_feedback(Vote(completion_id="c1", rating=1))
    unknown = ledger.put_feedback(Vote(completion_id="nope", rating=1))
    large = ledger.put_feedback(Vote(completion_id="c1", rating=1, user="u", comment="x" * 10**6))
    hold.set()
    assert small.result()[1]
    with pytest.raises(NotFound):
        unknown.result()
    with pytest.raises(LedgerFull):
        large.result()
    assert ledger.count("pending").result() == 1


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerUnavailable, match="file/data"):
        Ledger(tmp_path / "file" / "data" / "ledger.sqlite3")


@pytest.mark.parametrize("content", [b"not a database, " * 500, b"\0" * 10])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.sqlite3"
    path.write_bytes(content)
    with pytest.raises(LedgerCorrupt, match=r"ledger\.sqlite3"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(LedgerCorrupt, match="has schema 99"):
        Ledger(path)


def test_a_closed_ledger_says_so(ledger: Ledger) -> None:
    ledger.close()
    ledger.close()
    for answer in (ledger.count("pending"), ledger.release_batch()):
        with pytest.raises(LedgerUnavailable, match="closed"):
            answer.result()


async def test_awaiting_and_cancelling(ledger: Ledger) -> None:
    ledger.add_completion(completion())
    begun, hold = threading.Event(), threading.Event()
    ledger._store.write(lambda db: begun.set() or hold.wait(10))
    # What is written in one transaction with it can no longer be cancelled.
    assert await asyncio.to_thread(begun.wait, 10)
    task = asyncio.ensure_future(_await(ledger.put_feedback(Vote(completion_id="c1", rating=1))))
    await asyncio.sleep(0)
    task.cancel()
    hold.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ledger.count("pending") == 0
    assert (await ledger.put_feedback(Vote(completion_id="c1", rating=1)))[1]


async def _await(answer):
    return await answer


def test_many_threads_group_their_votes(ledger: Ledger) -> None:
    for number in range(200):
        ledger.add_completion(completion(f"c{number}"))
    threads = [
        threading.Thread(target=lambda n=n: [vote(ledger, f"c{i}") for i in range(n, 200, 8)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.count("pending").result() == 200


@pytest.mark.parametrize(
    "kind",
    [e for e in vars(errors).values() if isinstance(e, type) and e.__module__ == errors.__name__],
)
def test_errors_survive_pickling(kind) -> None:
    error = kind("says", "field", "word")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "says"
    assert copy.envelope() == error.envelope()
    assert copy.envelope()["error"]["code"] == "word"


# Acknowledges on standard output what has been answered; forked anew for every round, so that only the
# ledger is set up between two kills.
WRITER = textwrap.dedent(
    """
    import os, sys
    from alchemist.server.ledger import Ledger
    from alchemist.server.records import Completion, Vote

    def write(path, number):
        ledger = Ledger(path)
        ledger.recover().result()
        version = max(v.version for v in ledger.versions().result())
        for i in range(10**9):
            rid = f"r{number}-{i}"
            ledger.add_completion(Completion(
                id=rid, version=version, prompt_ids=[1] * 50, response_ids=[2], response_logprobs=[]))
            answers = [ledger.put_feedback(Vote(completion_id=rid, rating=1, user=str(u)))
                       for u in range(3)]
            for answer in answers:
                os.write(1, f"vote {answer.result()[0].id}\\n".encode())
            if i % 3 == 2:
                ids = [item.feedback_id for item in ledger.next_batch(8).result()]
                folder = os.path.join(os.path.dirname(path), f"v{version + 1}")
                os.makedirs(folder, exist_ok=True)
                ledger.commit_step(parent=version, version=version + 1, step=version + 1,
                                   path=folder, metrics={}, trained=ids).result()
                version += 1
                os.write(1, f"step {version} {' '.join(ids)}\\n".encode())

    for number, line in enumerate(sys.stdin):
        child = os.fork()
        if child == 0:
            write(sys.argv[1], number)
        os.write(1, f"pid {child}\\n".encode())
        os.waitpid(child, 0)
        os.write(1, b"ended\\n")
    """
)


def test_kill_at_any_instant_loses_no_acknowledged_vote(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    generator = random.Random(0)
    votes: set[str] = set()
    steps: dict[int, list[str]] = {}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(12):
            process.stdin.write("go\n")
            process.stdin.flush()
            pid = int(process.stdout.readline().split()[1])
            killer = threading.Timer(generator.uniform(0.02, 0.4), os.kill, [pid, signal.SIGKILL])
            killer.start()
            for line in process.stdout:
                kind, *words = line.split()
                if kind == "ended":
                    break
                if kind == "vote":
                    votes.add(words[0])
                else:
                    steps[int(words[0])] = words[1:]
            killer.join()
        process.stdin.close()
    assert len(votes) > 50
    assert len(steps) > 5
    ledger = Ledger(path)
    stored: dict[str, str] = {}
    after = None
    while True:
        page, has_more = ledger.list_feedback(limit=1000, after=after).result()
        stored |= {f.id: f.state for f in page}
        if not has_more:
            break
        after = page[-1].id
    assert votes <= set(stored)
    by_version = {v.version: v.feedback_ids for v in ledger.versions().result()}
    for step, ids in steps.items():
        assert sorted(by_version[step]) == sorted(ids)
    trained = [i for ids in by_version.values() for i in ids]
    assert len(trained) == len(set(trained))
    assert set(trained) == {i for i, state in stored.items() if state == "trained"}
    assert {s.step for s in ledger.steps().result()} == set(by_version) - {0}
    ledger.close()


def test_an_answer_comes_after_the_commit(ledger: Ledger) -> None:
    ledger.add_completion(completion())
    hold = threading.Event()
    ledger._store.write(lambda db: hold.wait(10))
    answer = ledger.put_feedback(Vote(completion_id="c1", rating=1))
    seen: list[int] = []

    def look(future: object) -> None:
        # Runs in the thread that answers, at that instant; another connection sees only what is committed.
        other = sqlite3.connect(ledger.directory / "ledger.sqlite3")
        seen.append(other.execute("SELECT count(*) FROM feedback").fetchone()[0])
        other.close()

    answer.future.add_done_callback(look)
    hold.set()
    answer.result()
    ledger.close()
    assert seen == [1]


NORMAL, FULL = 1, 2
"""SQLite's levels of `synchronous`."""


def level(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA synchronous").fetchone()[0]


def test_one_durable_operation_makes_its_transaction_durable(ledger: Ledger) -> None:
    write = ledger._store.write
    assert write(level, is_durable=False).result() == NORMAL
    assert write(level).result() == FULL
    assert write(level, is_durable=False).result() == NORMAL
    go_on = threading.Event()
    write(lambda db: go_on.wait(30))
    together = [write(level, is_durable=False), write(level), write(level, is_durable=False)]
    go_on.set()
    assert [answer.result() for answer in together] == [FULL] * 3


def test_an_answer_is_synced_if_somebody_has_voted_on_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = {}
    insert = ledger._insert_completion

    def watch(db: sqlite3.Connection, given: Completion) -> int:
        levels[given.id] = level(db)
        return insert(db, given)

    monkeypatch.setattr(ledger, "_insert_completion", watch)
    for rid in ("alone", "voted", "again"):
        ledger.mark_streaming(rid)
    vote(ledger, "voted")
    vote(ledger, "again")
    for rid in ("alone", "voted"):
        ledger.add_completion(completion(rid)).result()
    # Its id comes once more.
    ledger.drop_completion("again", "a test").result()
    ledger.add_completion(completion("again")).result()
    assert levels == {"alone": NORMAL, "voted": FULL, "again": NORMAL}
    assert not ledger._awaited


def test_commits_are_synced(ledger: Ledger) -> None:
    def pragma(name: str) -> object:
        query = f"PRAGMA {name}"
        return ledger._store.write(lambda db: db.execute(query).fetchone()[0]).result()

    assert (pragma("journal_mode"), pragma("synchronous"), pragma("foreign_keys")) == (
        *("wal", FULL, 1),
    )
