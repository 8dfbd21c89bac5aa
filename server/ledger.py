"""The durable account of completion → feedback → step → version.

Every method queues its work at once and gives an `Answer`: `await` it in the server, `.result()` elsewhere.
A write's answer comes after it is on disk. Writes happen in the order of the calls, so a vote finds the
completion whose `add_completion` was called before it.

    vote:     waiting ──completion added──► pending ──commit_step──► trained
                  └──────never finished──────► failed ◄──────┘ a new vote of the same user: pending again
    version:  staged ──► live ◄──► retired        staged, live ──► failed

A batch handed out by `next_batch` is claimed, in memory: its votes cannot be changed until `commit_step`,
`release_batch`, or the next `next_batch`. Nothing about a claim is stored, so a crash undoes it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from alchemist.server import votes
from alchemist.server.errors import Conflict, InvalidRequest, NotFound
from alchemist.server.records import Completion, Feedback, Trainable, TrainingItem, Vote
from alchemist.server.schema import (
    COMPLETION_COLUMNS,
    FEEDBACK_COLUMNS,
    MIGRATIONS,
    completion_row,
    stored_path,
    to_completion,
    to_feedback,
)
from alchemist.server.store import Answer, Store
from alchemist.server.versions import VersionTables, insert_step

logger = logging.getLogger(__name__)

IDEMPOTENCY_SECONDS = 7 * 24 * 3600
"""How long an idempotency key is remembered."""

_PRUNE_EVERY = 1024
_MAX_UNSAVED = 4096
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Ledger(VersionTables):
    """One data directory's ledger; see the module. `close` when done."""

    def __init__(
        self,
        path: str | Path,
        *,
        keep_completions: int = 100_000,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Opens or creates the SQLite file `path`; its directory is locked for this process.

        Raises:
            LedgerLocked, LedgerUnavailable, LedgerCorrupt: as `Store`.
        """
        super().__init__(Store(Path(path), MIGRATIONS), now)
        self._keep_completions = keep_completions
        # A server that is started often prunes, too: with its first completion.
        self._num_added = _PRUNE_EVERY - 1
        self._claimed: set[str] = set()
        self._digests: votes.Digests = {}
        # Requests being streamed (None), and finished ones that could not be written (the completion).
        self._open: dict[str, Completion | None] = {}
        self._awaited: set[str] = set()
        """Of those, the ones that have votes already."""
        self._open_lock = threading.Lock()
        self._retried: str | None = None
        """Of those that could not be written, the one that is being written again."""
        self.num_unsaved_completions = 0
        """Completions that could not be written when they finished, since the start."""

    def close(self) -> None:
        """Finishes what is queued. Idempotent."""
        self._store.close()

    # Completions

    def mark_streaming(self, rid: str) -> None:
        """From now until `add_completion` or `drop_completion`, feedback for `rid` is taken and waits."""
        with self._open_lock:
            self._open.setdefault(rid, None)

    def is_open(self, rid: str) -> bool:
        """Whether `rid` is marked and neither stored nor dropped yet."""
        with self._open_lock:
            return rid in self._open

    def add_completion(self, completion: Completion) -> Answer[int]:
        """Stores a finished completion; its waiting votes become pending; how many. Nobody needs to wait for it.

        Unless there are votes on it the machine's end may take it with it, for as long as nothing else is stored. A
        failure is logged and counted, never raised into a reply; a bounded number of completions that could not be
        written stay in memory, and are written with the first vote on them, or as soon as others can be.
        """
        with self._open_lock:
            is_awaited = completion.id in self._awaited
        answer = self._store.write(
            lambda db: self._insert_completion(db, completion), is_durable=is_awaited
        )

        def finished(future: Future[int]) -> None:
            error = None if future.cancelled() else future.exception()
            with self._open_lock:
                is_new = self._open.pop(completion.id, None) is None
                if completion.id == self._retried:
                    self._retried = None
                if error is not None:
                    self.num_unsaved_completions += is_new
                    if len(self._open) < _MAX_UNSAVED:
                        self._open[completion.id] = completion
                if completion.id not in self._open:
                    self._awaited.discard(completion.id)
                unsaved = None
                if error is None and self._retried is None:
                    unsaved = next((kept for kept in self._open.values() if kept is not None), None)
                    self._retried = None if unsaved is None else unsaved.id
            if error is not None:
                logger.error("completion %s was not stored: %s", completion.id, error)
            elif unsaved is not None:
                self.add_completion(unsaved)

        answer.future.add_done_callback(finished)
        return answer

    def drop_completion(self, rid: str, reason: str) -> Answer[int]:
        """Ends a marked request of which nothing is kept; its waiting votes fail with `reason`; how many."""
        with self._open_lock:
            self._open.pop(rid, None)
            self._awaited.discard(rid)
        return self._store.write(lambda db: votes.fail_waiting(db, reason, rid, self._now()))

    def get_completion(self, rid: str) -> Answer[Completion]:
        """Raises NotFound; a completion still streaming that has feedback is there, without tokens."""

        def operation(db: sqlite3.Connection) -> Completion:
            row = votes.completion_row(db, rid)
            if row is None:
                raise _unknown_completion(rid)
            return to_completion(row)

        return self._store.read(operation)

    def _insert_completion(self, db: sqlite3.Connection, completion: Completion) -> int:
        rid, now = completion.id, self._now()
        self._digests.pop(rid, None)
        old = votes.completion_row(db, rid)
        if old is not None:
            has_votes = db.execute("SELECT 1 FROM feedback WHERE completion_id = ?", (rid,))
            if old["state"] != "streaming" and old["response_ids"] and has_votes.fetchone():
                # A client may choose its request ids; what a vote is about must not change under it. One without tokens
                # was given up before its report came.
                logger.warning(
                    "completion %s exists and has feedback; the new one is not kept", rid
                )
                return 0
        placeholders = ", ".join("?" * len(COMPLETION_COLUMNS.split(",")))
        update = ", ".join(f"{c} = excluded.{c}" for c in COMPLETION_COLUMNS.split(", ")[1:])
        db.execute(
            f"INSERT INTO completions ({COMPLETION_COLUMNS}) VALUES ({placeholders})"
            f" ON CONFLICT (id) DO UPDATE SET {update}",
            completion_row(completion, completion.created or now),
        )
        num_waited = db.execute(
            "UPDATE feedback SET state = 'pending', updated = ?"
            " WHERE completion_id = ? AND state = 'waiting'",
            (now, rid),
        ).rowcount
        self._num_added += 1
        if self._num_added % _PRUNE_EVERY == 0:
            votes.prune(db, self._keep_completions, now - IDEMPOTENCY_SECONDS)
        return num_waited

    # Feedback

    def put_feedback(
        self, vote: Vote, *, idempotency_key: str | None = None
    ) -> Answer[tuple[Feedback, bool]]:
        """Stores a vote, or replaces the one of the same completion and user while it is not consumed.

        Returns the stored feedback, and whether it is new. A repeated `idempotency_key` gives the first
        answer again and changes nothing. A replaced vote keeps its id.

        Raises:
            NotFound: unknown completion.
            Conflict: the earlier vote is trained or being trained, or `vote.id` belongs to another.
            InvalidRequest: `vote.id` is malformed, or the key came before with another request.
        """
        fingerprint = hashlib.sha256(msgspec.json.encode(vote)).digest()

        def operation(db: sqlite3.Connection) -> tuple[Feedback, bool]:
            if idempotency_key is not None:
                earlier = votes.replay(db, idempotency_key, fingerprint)
                if earlier is not None:
                    return earlier
            feedback, is_created = self._upsert(db, vote)
            if idempotency_key is not None:
                answer = msgspec.json.encode(feedback).decode()
                db.execute(
                    "INSERT INTO idempotency VALUES (?, ?, ?, ?, ?)",
                    (idempotency_key, fingerprint, answer, is_created, self._now()),
                )
            return feedback, is_created

        def finished(future: Future[tuple[Feedback, bool]]) -> None:
            if not future.cancelled() and future.exception() is None:
                with self._open_lock:
                    if self._open.get(vote.completion_id) is not None:
                        # It was written with the vote.
                        del self._open[vote.completion_id]
                        self._awaited.discard(vote.completion_id)

        with self._open_lock:
            if vote.completion_id in self._open:
                self._awaited.add(vote.completion_id)
        answer = self._store.write(operation)
        answer.future.add_done_callback(finished)
        return answer

    def get_feedback(self, feedback_id: str) -> Answer[Feedback]:
        """Raises NotFound."""
        return self._store.read(lambda db: votes.find_feedback(db, feedback_id))

    def delete_feedback(self, feedback_id: str) -> Answer[Feedback]:
        """Removes a vote that is not consumed, and gives what was removed.

        Raises:
            NotFound: no such vote.
            Conflict: it is trained or being trained.
        """

        def operation(db: sqlite3.Connection) -> Feedback:
            feedback = votes.find_feedback(db, feedback_id)
            self._refuse_consumed(feedback)
            db.execute("DELETE FROM feedback WHERE id = ?", (feedback_id,))
            return feedback

        return self._store.write(operation)

    def list_feedback(
        self,
        *,
        limit: int = 20,
        after: str | None = None,
        is_ascending: bool = False,
        completion_id: str | None = None,
        user: str | None = None,
        state: str | None = None,
    ) -> Answer[tuple[list[Feedback], bool]]:
        """A page of votes by time of arrival, newest first, and whether more follow.

        `after` is the id of the last vote of the page before; NotFound if there is none.
        """
        filters = {"completion_id": completion_id, "user": user, "state": state}

        return self._store.read(
            lambda db: votes.list_feedback(db, filters, limit, after, is_ascending)
        )

    def _upsert(self, db: sqlite3.Connection, vote: Vote) -> tuple[Feedback, bool]:
        state = self._state_for_vote(db, vote.completion_id)
        now = self._now()
        old = db.execute(
            f"SELECT {FEEDBACK_COLUMNS} FROM feedback"
            " WHERE completion_id = ? AND ifnull(user, '') = ?",
            (vote.completion_id, vote.user or ""),
        ).fetchone()
        content = {
            "rating": vote.rating,
            "correction": vote.correction,
            "comment": vote.comment,
            "tags": msgspec.json.encode(vote.tags).decode(),
            "metadata": msgspec.json.encode(vote.metadata).decode(),
            "updated": now,
            "state": state,
            "reason": None,
        }
        if old is not None:
            self._refuse_consumed(to_feedback(old))
            row = {**dict(old), **content}
            assignments = ", ".join(f"{name} = :{name}" for name in content)
            db.execute(f"UPDATE feedback SET {assignments} WHERE id = :id", row)
            return to_feedback(row), False
        if vote.id is not None and not _ID.fullmatch(vote.id):
            raise InvalidRequest("id must be 1 to 64 of the characters A-Z a-z 0-9 _ . -", "id")
        if vote.id and db.execute("SELECT 1 FROM feedback WHERE id = ?", (vote.id,)).fetchone():
            raise Conflict(
                f"id {vote.id!r} belongs to the feedback of another answer or user", "id"
            )
        row = {
            "id": vote.id or f"fb_{uuid.uuid4().hex}",
            "completion_id": vote.completion_id,
            "user": vote.user,
            "created": now,
            "step": None,
            "version": None,
            **content,
        }
        columns = ", ".join(row)
        values = ", ".join(f":{name}" for name in row)
        db.execute(f"INSERT INTO feedback ({columns}) VALUES ({values})", row)
        return to_feedback(row), True

    def _state_for_vote(self, db: sqlite3.Connection, rid: str) -> str:
        """State a vote on `rid` starts in; writes what is known of `rid` only in memory."""
        row = votes.completion_row(db, rid)
        with self._open_lock:
            is_open, unsaved = rid in self._open, self._open.get(rid)
        if row is None and not is_open:
            raise _unknown_completion(rid)
        if row is None or (row["state"] == "streaming" and unsaved is not None):
            completion = unsaved or Completion(
                id=rid,
                version=0,
                prompt_ids=[],
                response_ids=[],
                response_logprobs=[],
                state="streaming",
            )
            self._insert_completion(db, completion)
            return "waiting" if completion.state == "streaming" else "pending"
        return "waiting" if row["state"] == "streaming" else "pending"

    def _refuse_consumed(self, feedback: Feedback) -> None:
        if feedback.state == "trained" or feedback.id in self._claimed:
            how = (
                f"is part of version v{feedback.version}"
                if feedback.version
                else "is being trained"
            )
            raise Conflict(
                f"feedback {feedback.id} {how} and can no longer be changed",
                None,
                "feedback_consumed",
            )

    # Training

    def next_batch(
        self, limit: int, *, pairs: bool = False, versions: Sequence[int] = ()
    ) -> Answer[list[TrainingItem]]:
        """Pending votes, at most `limit`, with their completions; they are claimed. The oldest ones, but first those on
        answers of `versions`.

        With `pairs`, those that make preference pairs; the last pair is kept whole.

        There is one trainer: whatever an earlier call claimed is free again.
        """

        def operation(db: sqlite3.Connection) -> list[TrainingItem]:
            matches = self._pick(db, limit, versions, pairs)
            completion_columns = ", ".join(f"c.{c}" for c in COMPLETION_COLUMNS.split(", "))
            rows = db.execute(
                f"SELECT f.id AS feedback_id, f.rating, f.correction, {completion_columns}"
                " FROM feedback f JOIN completions c ON c.id = f.completion_id"
                " WHERE f.id IN (SELECT value FROM json_each(?)) ORDER BY f.seq",
                (msgspec.json.encode(list(matches)).decode(),),
            ).fetchall()
            items = [
                TrainingItem(
                    feedback_id=row["feedback_id"],
                    label=row["rating"] > 0,
                    correction=row["correction"],
                    completion=to_completion(row),
                    match=matches[row["feedback_id"]],
                )
                for row in rows
            ]
            self._claimed = {item.feedback_id for item in items}
            return items

        return self._store.write(operation)

    def release_batch(self) -> Answer[None]:
        """Gives up the claim of the last `next_batch`."""

        def operation(db: sqlite3.Connection) -> None:
            self._claimed = set()

        return self._store.write(operation)

    def count(self, state: str) -> Answer[int]:
        """Votes in `state`."""
        query = "SELECT count(*) FROM feedback WHERE state = ?"
        return self._store.read(lambda db: int(db.execute(query, (state,)).fetchone()[0]))

    def trainable(self, limit: int, *, pairs: bool = False) -> Answer[Trainable]:
        """The votes that `next_batch` would give."""

        def operation(db: sqlite3.Connection) -> Trainable:
            picked = self._pick(db, limit, (), pairs)
            since = votes.pending_since(db, picked)
            return Trainable(count=len(picked), waited_s=max(0.0, self._now() - since))

        return self._store.read(operation)

    def _pick(
        self, db: sqlite3.Connection, limit: int, versions: Sequence[int], pairs: bool
    ) -> dict[str, str]:
        if pairs:
            return votes.pick_pairs(db, limit, versions, self._digests)
        return votes.pick_oldest(db, limit, versions)

    def fail_feedback(self, reasons: Mapping[str, str]) -> Answer[None]:
        """Pending votes that cannot be trained: feedback id → why."""
        return self._store.write(lambda db: votes.fail(db, reasons, self._now()))

    def commit_step(
        self,
        *,
        parent: int,
        version: int,
        step: int,
        path: str | os.PathLike[str],
        metrics: Mapping[str, Any],
        trained: Iterable[str],
        failed: Mapping[str, str] | None = None,
    ) -> Answer[None]:
        """One transaction: the step, the new version (staged), and every vote it consumed.

        `failed` maps feedback ids of the batch that could not be trained to why. Claims end.

        Raises:
            LedgerError: a vote is not pending, step or version exist, or parent does not; nothing of it
                is stored.
        """
        trained_ids = list(trained)
        directory = stored_path(path, self.directory)

        def operation(db: sqlite3.Connection) -> None:
            now = self._now()
            insert_step(db, step, parent, version, directory, metrics, now)
            votes.mark_trained(db, trained_ids, step, version, now)
            votes.fail(db, failed or {}, now)
            self._claimed = set()

        return self._store.write(operation)


def _unknown_completion(rid: str) -> NotFound:
    return NotFound(f"no completion {rid!r}", "completion_id", "completion_not_found")
