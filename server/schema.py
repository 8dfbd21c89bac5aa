"""The ledger's tables, and rows to values and back. Appending to MIGRATIONS is how the schema changes.

    completions ◄── feedback ◄── ledger ──► steps ──► versions        idempotency    settings

`ledger` has one row per trained vote, feedback → step → version; its primary key is what makes "trained
once" a property of the database. At most one version is live: a unique partial index.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from alchemist.server.records import Completion, Feedback, Step, Version

MIGRATIONS = [
    """
    CREATE TABLE completions (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        created REAL NOT NULL,
        version INTEGER NOT NULL,
        model TEXT NOT NULL,
        prompt_ids BLOB NOT NULL,          -- int32, little-endian
        response_ids BLOB NOT NULL,        -- int32
        response_logprobs BLOB NOT NULL,   -- float32, nats
        sampling TEXT NOT NULL,            -- JSON
        finish_reason TEXT,
        extra_key TEXT,
        state TEXT NOT NULL CHECK (state IN ('streaming', 'done', 'aborted'))
    );
    CREATE TABLE versions (
        version INTEGER PRIMARY KEY,
        step INTEGER,
        parent INTEGER REFERENCES versions,
        state TEXT NOT NULL CHECK (state IN ('staged', 'live', 'retired', 'failed')),
        path TEXT,                         -- relative to the data directory where it lies inside
        created REAL NOT NULL,
        reason TEXT
    );
    CREATE UNIQUE INDEX one_live_version ON versions (state) WHERE state = 'live';
    CREATE TABLE steps (
        step INTEGER PRIMARY KEY,
        parent INTEGER NOT NULL REFERENCES versions,
        version INTEGER NOT NULL UNIQUE REFERENCES versions,
        created REAL NOT NULL,
        metrics TEXT NOT NULL              -- JSON
    );
    CREATE TABLE feedback (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        completion_id TEXT NOT NULL REFERENCES completions (id),
        user TEXT,
        rating INTEGER NOT NULL CHECK (rating IN (1, -1)),
        correction TEXT,
        comment TEXT,
        tags TEXT NOT NULL,                -- JSON
        metadata TEXT NOT NULL,            -- JSON
        created REAL NOT NULL,
        updated REAL NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('waiting', 'pending', 'trained', 'failed')),
        reason TEXT,
        step INTEGER REFERENCES steps,
        version INTEGER REFERENCES versions,
        CHECK ((state = 'trained') = (step IS NOT NULL) AND (step IS NULL) = (version IS NULL))
    );
    CREATE UNIQUE INDEX one_vote ON feedback (completion_id, ifnull(user, ''));
    CREATE INDEX feedback_by_state ON feedback (state, seq);
    CREATE INDEX feedback_by_version ON feedback (version) WHERE version IS NOT NULL;
    CREATE TABLE ledger (
        feedback_id TEXT PRIMARY KEY REFERENCES feedback (id),
        step INTEGER NOT NULL REFERENCES steps,
        version INTEGER NOT NULL REFERENCES versions
    ) WITHOUT ROWID;
    CREATE TABLE idempotency (
        key TEXT PRIMARY KEY,
        fingerprint BLOB NOT NULL,         -- SHA-256 of the request
        answer TEXT NOT NULL,              -- JSON of the feedback as it was answered
        is_created INTEGER NOT NULL,
        created REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    INSERT INTO versions (version, state, created) VALUES (0, 'live', CAST(strftime('%s', 'now') AS REAL));
    """,
]

COMPLETION_COLUMNS = (
    "id, created, version, model, prompt_ids, response_ids, response_logprobs, sampling,"
    " finish_reason, extra_key, state"
)
FEEDBACK_COLUMNS = (
    "id, completion_id, user, rating, correction, comment, tags, metadata, created, updated,"
    " state, reason, step, version"
)


def completion_row(completion: Completion, created: float) -> tuple[Any, ...]:
    """Values of COMPLETION_COLUMNS."""
    return (
        completion.id,
        created,
        completion.version,
        completion.model,
        np.asarray(completion.prompt_ids, dtype="<i4").tobytes(),
        np.asarray(completion.response_ids, dtype="<i4").tobytes(),
        np.asarray(completion.response_logprobs, dtype="<f4").tobytes(),
        _sampling_json(completion.sampling),
        completion.finish_reason,
        completion.extra_key,
        completion.state,
    )


def _sampling_json(sampling: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(sampling, enc_hook=str).decode()
    except (UnicodeEncodeError, RecursionError):
        # A client's own text: lone surrogates. The answer matters more.
        return "{}"


def to_completion(row: sqlite3.Row) -> Completion:
    """From a row that holds COMPLETION_COLUMNS."""
    fields = {name.strip(): row[name.strip()] for name in COMPLETION_COLUMNS.split(",")}
    for name in ("prompt_ids", "response_ids"):
        fields[name] = np.frombuffer(fields[name], dtype="<i4").tolist()
    logprobs = np.frombuffer(fields["response_logprobs"], dtype="<f4").tolist()
    sampling = msgspec.json.decode(fields["sampling"])
    return Completion(**{**fields, "response_logprobs": logprobs, "sampling": sampling})


def to_feedback(row: sqlite3.Row | dict[str, Any]) -> Feedback:
    """From a row of FEEDBACK_COLUMNS."""
    fields = dict(row)
    for name in ("tags", "metadata"):
        fields[name] = msgspec.json.decode(fields[name])
    return Feedback(**fields)


def to_step(row: sqlite3.Row) -> Step:
    return Step(**{**dict(row), "metrics": msgspec.json.decode(row["metrics"])})


def to_version(row: sqlite3.Row, feedback_ids: list[str], directory: Path) -> Version:
    path = None if row["path"] is None else str(directory / row["path"])
    return Version(**{**dict(row), "path": path, "feedback_ids": feedback_ids})


def stored_path(path: str | os.PathLike[str], directory: Path) -> str:
    """`path` relative to the data directory if it lies inside, so that the directory can be moved."""
    absolute = Path(path).absolute()
    inside = absolute.is_relative_to(directory)
    return str(absolute.relative_to(directory) if inside else absolute)
