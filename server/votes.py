"""Operations on votes inside a transaction of the ledger: functions of an open connection."""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from alchemist.server.errors import InvalidRequest, LedgerError, NotFound
from alchemist.server.records import Feedback
from alchemist.server.schema import COMPLETION_COLUMNS, FEEDBACK_COLUMNS, to_feedback


def completion_row(db: sqlite3.Connection, rid: str) -> sqlite3.Row | None:
    """The row of COMPLETION_COLUMNS, if there is one."""
    query = f"SELECT {COMPLETION_COLUMNS} FROM completions WHERE id = ?"
    row: sqlite3.Row | None = db.execute(query, (rid,)).fetchone()
    return row


def find_feedback(db: sqlite3.Connection, feedback_id: str) -> Feedback:
    """Raises NotFound."""
    query = f"SELECT {FEEDBACK_COLUMNS} FROM feedback WHERE id = ?"
    row = db.execute(query, (feedback_id,)).fetchone()
    if row is None:
        raise NotFound(f"no feedback {feedback_id!r}", "id")
    return to_feedback(row)


def list_feedback(
    db: sqlite3.Connection,
    filters: Mapping[str, str | None],
    limit: int,
    after: str | None,
    is_ascending: bool,
) -> tuple[list[Feedback], bool]:
    """A page of votes by time of arrival, and whether more follow. Raises NotFound for `after`."""
    where = [f"{name} = ?" for name, value in filters.items() if value is not None]
    values: list[Any] = [value for value in filters.values() if value is not None]
    if after is not None:
        row = db.execute("SELECT seq FROM feedback WHERE id = ?", (after,)).fetchone()
        if row is None:
            raise NotFound(f"no feedback {after!r} to list after", "after")
        where.append("seq > ?" if is_ascending else "seq < ?")
        values.append(row["seq"])
    rows = db.execute(
        f"SELECT {FEEDBACK_COLUMNS} FROM feedback WHERE {' AND '.join(['1', *where])}"
        f" ORDER BY seq {'ASC' if is_ascending else 'DESC'} LIMIT ?",
        (*values, limit + 1),
    ).fetchall()
    return [to_feedback(row) for row in rows[:limit]], len(rows) > limit


_PENDING = """FROM feedback f JOIN completions c ON c.id = f.completion_id
    WHERE f.state = 'pending' ORDER BY c.version NOT IN (SELECT value FROM json_each(?)), f.seq"""
"""First the votes on answers of some versions, and of those the oldest."""


def _json(values: Sequence[int] | Sequence[str]) -> str:
    return msgspec.json.encode(values).decode()


def pick_oldest(db: sqlite3.Connection, limit: int, versions: Sequence[int]) -> dict[str, str]:
    """Pending votes, at most `limit`: feedback id → no pair. Those on answers of `versions` come
    first, and of two alike the older one.
    """
    rows = db.execute(f"SELECT f.id {_PENDING} LIMIT ?", (_json(versions), limit))
    return dict.fromkeys((row["id"] for row in rows), "")


Digests = dict[str, tuple[bytes, bytes]]
"""Of completions, by id: short ones of the prompt and of the response."""


def _read_digests(db: sqlite3.Connection, completion_ids: Sequence[str]) -> Digests:
    rows = db.execute(
        "SELECT id, prompt_ids, response_ids FROM completions"
        " WHERE id IN (SELECT value FROM json_each(?))",
        (_json(completion_ids),),
    )
    return {row["id"]: (_digest(row["prompt_ids"]), _digest(row["response_ids"])) for row in rows}


def _digest(ids: bytes) -> bytes:
    return hashlib.blake2b(ids, digest_size=16).digest()


_NO_TOKENS = _digest(b"")


def pick_pairs(
    db: sqlite3.Connection, limit: int, versions: Sequence[int], digests: Digests
) -> dict[str, str]:
    """Pending votes that make preference pairs, feedback id → pair: about `limit`, in the same order.

    A vote with a correction is a pair by itself. Of others, two make one: opposite votes on different answers
    to the same prompt. A vote without a partner is left out, and stays pending.

    Args:
        digests: kept between calls, so that no completion is read twice; those of pending votes are in it afterwards.
    """
    rows = db.execute(
        "SELECT f.id, f.rating, f.completion_id, f.correction IS NOT NULL AS is_pair " + _PENDING,
        (_json(versions),),
    ).fetchall()
    # The reader's thread and the writer's share them.
    kept = dict(digests)
    known = {rid: kept[rid] for row in rows if (rid := row["completion_id"]) in kept}
    known |= _read_digests(
        db, list({rid for row in rows if (rid := row["completion_id"]) not in kept})
    )
    # One without tokens may be replaced by what comes late.
    digests.update({rid: both for rid, both in known.items() if both[1] != _NO_TOKENS})
    for rid in kept.keys() - known.keys():
        digests.pop(rid, None)
    picked: dict[str, str] = {}
    alone: dict[tuple[bytes, int], dict[str, bytes]] = {}
    for row in rows:
        if len(picked) >= limit:
            break
        if row["is_pair"]:
            picked[row["id"]] = row["id"]
            continue
        prompt, response = known[row["completion_id"]]
        opposite = alone.get((prompt, -row["rating"]), {})
        partner = next((f for f, other in opposite.items() if other != response), None)
        if partner is None:
            same = alone.setdefault((prompt, row["rating"]), {})
            same[row["id"]] = response
        else:
            del opposite[partner]
            picked[partner] = picked[row["id"]] = partner
    return picked


def pending_since(db: sqlite3.Connection, picked: Mapping[str, str]) -> float:
    """When the first of some pending votes, as they were picked, became trainable: Unix seconds; inf: there is none."""
    rows = db.execute(
        "SELECT id, updated FROM feedback WHERE id IN (SELECT value FROM json_each(?))",
        (_json(list(picked)),),
    )
    complete: dict[str, float] = {}
    for row in rows:
        pair = picked[row["id"]] or row["id"]
        complete[pair] = max(row["updated"], complete.get(pair, 0.0))
    return min(complete.values(), default=math.inf)


def replay(db: sqlite3.Connection, key: str, fingerprint: bytes) -> tuple[Feedback, bool] | None:
    """What the first request with this idempotency key was answered; None: there was none.

    Raises:
        InvalidRequest: the key came with another request.
    """
    row = db.execute("SELECT * FROM idempotency WHERE key = ?", (key,)).fetchone()
    if row is None:
        return None
    if row["fingerprint"] != fingerprint:
        raise InvalidRequest(
            "this Idempotency-Key came before with a different request",
            "Idempotency-Key",
            "idempotency_key_reused",
        )
    return msgspec.json.decode(row["answer"], type=Feedback), bool(row["is_created"])


def fail_waiting(db: sqlite3.Connection, reason: str, rid: str | None, now: float) -> int:
    """Fails the votes waiting for `rid`, or for any completion if None; how many."""
    match, values = ("completion_id = ?", (rid,)) if rid else ("1", ())
    failed = db.execute(
        "UPDATE feedback SET state = 'failed', reason = ?, updated = ?"
        f" WHERE state = 'waiting' AND {match}",
        (reason, now, *values),
    ).rowcount
    match = "id = ?" if rid else "1"
    db.execute(
        f"UPDATE completions SET state = 'aborted' WHERE state = 'streaming' AND {match}", values
    )
    return failed


def fail(db: sqlite3.Connection, reasons: Mapping[str, str], now: float) -> None:
    """Pending votes that cannot be trained: id → why."""
    for feedback_id, reason in reasons.items():
        _take_pending(db, feedback_id, "state = 'failed', reason = ?", (reason,), now)


def mark_trained(
    db: sqlite3.Connection, feedback_ids: Iterable[str], step: int, version: int, now: float
) -> None:
    """Raises LedgerError if one is not pending."""
    assignment = "state = 'trained', reason = NULL, step = ?, version = ?"
    for feedback_id in feedback_ids:
        _take_pending(db, feedback_id, assignment, (step, version), now)
        db.execute("INSERT INTO ledger VALUES (?, ?, ?)", (feedback_id, step, version))


def requeue(db: sqlite3.Connection, version: int, now: float) -> None:
    """Makes the votes that `version` consumed pending again."""
    db.execute("DELETE FROM ledger WHERE version = ?", (version,))
    db.execute(
        "UPDATE feedback SET state = 'pending', step = NULL, version = NULL, updated = ?"
        " WHERE version = ?",
        (now, version),
    )


def prune(db: sqlite3.Connection, keep: int, forget_before: float) -> None:
    """Deletes the oldest completions without votes beyond `keep`, and old idempotency keys."""
    unvoted = (
        "FROM completions WHERE NOT EXISTS"
        " (SELECT 1 FROM feedback WHERE completion_id = completions.id)"
    )
    surplus = db.execute(f"SELECT count(*) {unvoted}").fetchone()[0] - keep
    if surplus > 0:
        oldest = f"SELECT seq {unvoted} ORDER BY seq LIMIT ?"
        db.execute(f"DELETE FROM completions WHERE seq IN ({oldest})", (surplus,))
    db.execute("DELETE FROM idempotency WHERE created < ?", (forget_before,))


def _take_pending(
    db: sqlite3.Connection,
    feedback_id: str,
    assignment: str,
    values: tuple[Any, ...],
    now: float,
) -> None:
    changed = db.execute(
        f"UPDATE feedback SET {assignment}, updated = ? WHERE id = ? AND state = 'pending'",
        (*values, now, feedback_id),
    ).rowcount
    if changed != 1:
        raise LedgerError(f"feedback {feedback_id} is not pending; nothing was committed")
