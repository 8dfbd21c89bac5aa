"""The ledger's second half: steps, versions, settings, and what a restart makes of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from alchemist.server import votes
from alchemist.server.errors import Conflict, LedgerError, NotFound
from alchemist.server.records import Recovery, Step, Version, VersionState
from alchemist.server.schema import stored_path, to_step, to_version
from alchemist.server.store import Answer, Store

# New state → states it may come from. `live → retired` happens only as another version goes live.
_VERSION_MOVES: dict[str, tuple[str, ...]] = {
    "live": ("staged", "retired"),
    "retired": ("staged",),
    "failed": ("staged", "retired"),
}

_SKIPPED = "a later version was trained from it before it went live"
_GONE = "its directory is gone"
_UNFINISHED = "the answer never finished: the server stopped while it was streaming"


class VersionTables:
    """Operations on steps, versions and settings, and `recover`; `Ledger` adds the rest."""

    def __init__(self, store: Store, now: Callable[[], float]) -> None:
        self._store = store
        self._now = now

    @property
    def directory(self) -> Path:
        """The data directory, absolute."""
        directory: Path = self._store.path.parent
        return directory

    def set_version_state(
        self, version: int, state: VersionState, reason: str | None = None, *, requeue: bool = False
    ) -> Answer[None]:
        """Moves a version; when one goes live the version that was live is retired with it.

        Args:
            requeue: with state `failed`, its votes are pending again and the ledger forgets the step's; also those of
                versions that nothing but this one contained (see `recover`).

        Raises:
            NotFound: no such version.
            Conflict: not a move there is, or its directory was given up.
        """

        def operation(db: sqlite3.Connection) -> None:
            row = db.execute("SELECT * FROM versions WHERE version = ?", (version,)).fetchone()
            if row is None:
                raise NotFound(f"no version v{version}", "version")
            if row["state"] == state:
                return
            if row["state"] not in _VERSION_MOVES.get(state, ()):
                raise Conflict(f"version v{version} is {row['state']} and cannot become {state}")
            if state == "live":
                if version and row["path"] is None:
                    raise Conflict(f"version v{version} is no longer kept", "version")
                db.execute("UPDATE versions SET state = 'retired' WHERE state = 'live'")
            db.execute(
                "UPDATE versions SET state = ?, reason = ? WHERE version = ?",
                (state, reason, version),
            )
            if requeue and state == "failed":
                for lost in (version, *_lost_with(db, version)):
                    votes.requeue(db, lost, self._now())

        return self._store.write(operation)

    def versions(self) -> Answer[list[Version]]:
        """All versions, oldest first, v0 among them."""
        return self._store.read(lambda db: _versions(db, self.directory, has_votes=True))

    def list_versions(
        self, *, limit: int = 20, after: int | None = None, is_ascending: bool = False
    ) -> Answer[tuple[list[Version], bool]]:
        """A page of versions, newest first, and whether more follow.

        `after` is the last version of the page before; NotFound if there is none.
        """

        def operation(db: sqlite3.Connection) -> tuple[list[Version], bool]:
            where = "1"
            values: tuple[int, ...] = ()
            if after is not None:
                values = (after,)
                if not db.execute("SELECT 1 FROM versions WHERE version = ?", values).fetchone():
                    raise NotFound(f"no version v{after} to list after", "after")
                where = f"version {'>' if is_ascending else '<'} ?"
            order = "ASC" if is_ascending else "DESC"
            query = f"SELECT version FROM versions WHERE {where} ORDER BY version {order} LIMIT ?"
            found = [row["version"] for row in db.execute(query, (*values, limit + 1))]
            page = [
                _versions(db, self.directory, number, has_votes=True)[0] for number in found[:limit]
            ]
            return page, len(found) > limit

        return self._store.read(operation)

    def get_version(self, version: int) -> Answer[Version]:
        """Raises NotFound."""

        def operation(db: sqlite3.Connection) -> Version:
            for found in _versions(db, self.directory, version, has_votes=True):
                return found
            raise NotFound(f"no version v{version}", "version")

        return self._store.read(operation)

    def live_version(self) -> Answer[int]:
        query = "SELECT version FROM versions WHERE state = 'live'"
        return self._store.read(lambda db: int(db.execute(query).fetchone()[0]))

    def rollback_target(self) -> Answer[int | None]:
        """Nearest ancestor of the live version that can be served; None: v0 is live."""

        def operation(db: sqlite3.Connection) -> int | None:
            by_number = {v.version: v for v in _versions(db, self.directory)}
            current = next(v for v in by_number.values() if v.state == "live")
            while current.parent is not None:
                current = by_number[current.parent]
                if current.version == 0 or (current.state == "retired" and current.path):
                    return current.version
            return None

        return self._store.read(operation)

    def set_path(self, version: int, path: Path) -> Answer[None]:
        """Where a version's directory is."""
        stored = stored_path(path, self.directory)

        def operation(db: sqlite3.Connection) -> None:
            db.execute("UPDATE versions SET path = ? WHERE version = ?", (stored, version))

        return self._store.write(operation)

    def prune_versions(self, keep: int) -> Answer[list[str]]:
        """Gives up the directories of all but the newest `keep` versions; the paths to delete now.

        v0, the live and the staged ones are kept in any case, and the live one's parent.
        """

        def operation(db: sqlite3.Connection) -> list[str]:
            held = [v for v in _versions(db, self.directory) if v.path is not None and v.version]
            live_parent = next((v.parent for v in held if v.state == "live"), None)
            given_up = [
                v
                for v in held[: max(0, len(held) - keep)]
                if v.state in ("retired", "failed") and v.version != live_parent
            ]
            for v in given_up:
                db.execute("UPDATE versions SET path = NULL WHERE version = ?", (v.version,))
            return [v.path for v in given_up if v.path]

        return self._store.write(operation)

    def last_step(self) -> Answer[Step | None]:
        def operation(db: sqlite3.Connection) -> Step | None:
            row = db.execute("SELECT * FROM steps ORDER BY step DESC LIMIT 1").fetchone()
            return to_step(row) if row else None

        return self._store.read(operation)

    def steps(self) -> Answer[list[Step]]:
        """All steps, oldest first."""
        query = "SELECT * FROM steps ORDER BY step"
        return self._store.read(lambda db: [to_step(row) for row in db.execute(query)])

    def sum_metric(self, name: str) -> Answer[float]:
        """Sum over all steps of a number in their metrics; 0 where it is missing."""
        query = "SELECT total(json_extract(metrics, ?)) FROM steps"
        return self._store.read(lambda db: float(db.execute(query, (f'$."{name}"',)).fetchone()[0]))

    def get_setting(self, name: str, default: Any = None) -> Answer[Any]:
        def operation(db: sqlite3.Connection) -> Any:
            row = db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
            return default if row is None else msgspec.json.decode(row["value"])

        return self._store.read(operation)

    def set_setting(self, name: str, value: Any) -> Answer[None]:
        """`value` is anything JSON holds."""
        text = msgspec.json.encode(value).decode()

        def operation(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, text))

        return self._store.write(operation)

    def recover(self) -> Answer[Recovery]:
        """Settles what the last run left open; call once, before serving.

        Votes that wait for an answer which never finished fail. Of the staged versions the newest whose directory is
        there, and that was trained from the live one, stays staged, to be published; those in between, which it
        contains, are retired, and others fail, their votes pending again. A live version whose directory is gone
        fails, and its nearest ancestor that can be served takes its place, v0 at worst; the votes in between are
        pending again, but where a staged version contains them.
        """

        def operation(db: sqlite3.Connection) -> Recovery:
            num_failed = votes.fail_waiting(db, _UNFINISHED, None, self._now())
            newest_first = _versions(db, self.directory)[::-1]
            there = {
                v.version for v in newest_first if v.path is not None and Path(v.path).is_dir()
            }
            there.add(0)
            for v in newest_first:
                if v.path is not None and v.version not in there:
                    state = "failed" if v.state in ("live", "staged") else v.state
                    _set(db, v.version, state, _GONE)
                    if v.state == "staged":
                        votes.requeue(db, v.version, self._now())
                    db.execute("UPDATE versions SET path = NULL WHERE version = ?", (v.version,))
            parents = {v.version: v.parent for v in newest_first}
            was_live = next((v.version for v in newest_first if v.state == "live"), 0)
            states = {v.version: v.state for v in newest_first if v.version in there}
            live = next((n for n, state in states.items() if state == "live"), None)
            staged = [n for n, state in states.items() if state == "staged"]
            skipped = {v.version for v in newest_first if v.reason == _SKIPPED} | {*staged}
            given_up: set[int] = set()
            line: list[int] = []
            for newest in staged:
                line = [newest]
                while (parent := parents[line[-1]]) in skipped:
                    line.append(parent)
                if parent == was_live:
                    break
                line = []
            if live is None:
                live = was_live
                while live and states.get(live) != "retired":
                    if not line:
                        # Else what is about to be published contains them.
                        votes.requeue(db, live, self._now())
                    live = parents[live] or 0
                _set(db, live, "live", "the live version's directory was gone")
            for number in staged:
                if number in line[1:]:
                    _set(db, number, "retired", _SKIPPED)
                elif number not in line:
                    # What is live was not made by it, and need not contain its votes.
                    reason = f"it was not trained from v{was_live}, which is live"
                    _set(db, number, "failed", reason)
                    votes.requeue(db, number, self._now())
                    given_up.add(number)
            directories = [
                v.path
                for v in newest_first
                if v.path
                and v.version in there
                and v.state != "failed"
                and v.version not in given_up
            ]
            return Recovery(
                live=live,
                staged=line[0] if line else None,
                directories=directories,
                num_failed_feedback=num_failed,
            )

        return self._store.write(operation)


def insert_step(
    db: sqlite3.Connection,
    step: int,
    parent: int,
    version: int,
    path: str,
    metrics: Mapping[str, Any],
    now: float,
) -> None:
    """Adds the step and its version, staged. Raises LedgerError if one exists, or parent does not."""
    known = {row["version"] for row in db.execute("SELECT version FROM versions")}
    if parent not in known or version in known:
        raise LedgerError(f"step {step}: version v{version} exists, or v{parent} does not")
    if db.execute("SELECT 1 FROM steps WHERE step = ?", (step,)).fetchone():
        raise LedgerError(f"step {step} is already committed")
    db.execute(
        "INSERT INTO versions VALUES (?, ?, ?, 'staged', ?, ?, NULL)",
        (version, step, parent, path, now),
    )
    text = msgspec.json.encode(dict(metrics)).decode()
    db.execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?)", (step, parent, version, now, text))


def _lost_with(db: sqlite3.Connection, version: int) -> list[int]:
    """The versions between `version` and the live one, if it was all that stood for them: they never went live, or
    their directories were gone when it was to be published.
    """
    rows = {row["version"]: row for row in db.execute("SELECT * FROM versions")}
    lost: list[int] = []
    parent = rows[version]["parent"]
    while parent and rows[parent]["state"] != "live":
        lost.append(parent)
        parent = rows[parent]["parent"]
    is_all = lost and rows[lost[0]]["reason"] in (_SKIPPED, _GONE)
    return lost if is_all and parent is not None and rows[parent]["state"] == "live" else []


def _set(db: sqlite3.Connection, version: int, state: str, reason: str) -> None:
    db.execute(
        "UPDATE versions SET state = ?, reason = ? WHERE version = ?", (state, reason, version)
    )


def _versions(
    db: sqlite3.Connection, directory: Path, only: int | None = None, *, has_votes: bool = False
) -> list[Version]:
    """Args:
    has_votes: with the ids of the votes in each, which are as many as were ever trained.
    """
    match, values = ("version = ?", (only,)) if only is not None else ("1", ())
    trained: dict[int, list[str]] = {}
    if has_votes:
        query = "SELECT id, version FROM feedback WHERE version IS NOT NULL"
        for row in db.execute(f"{query} AND {match} ORDER BY seq", values):
            trained.setdefault(row["version"], []).append(row["id"])
    rows = db.execute(f"SELECT * FROM versions WHERE {match} ORDER BY version", values)
    return [to_version(row, trained.get(row["version"], []), directory) for row in rows]
