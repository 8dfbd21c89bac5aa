"""A SQLite file with one writer thread that groups operations into durable transactions.

    callers ──write(op)──► queue ──► writer thread: BEGIN · op · op · … · COMMIT (fsync) ──► answers
    callers ──read(op)───────────► reader thread, its own read-only connection, sees what is committed

An answer resolves after the transaction that holds it is on disk (`synchronous=FULL`); one that need not survive the
machine's end does not wait for the disk (NORMAL), and is there with the next one that does. An operation that raises
takes back only its own changes. If the transaction itself fails (disk full, I/O error), every operation of the group is
tried again alone, so that one does not take others down.

One process: an exclusive `flock` on `<directory>/lock`. One connection that writes and checkpoints, which
also keeps clear of SQLite's WAL-reset bug (3.7.0 to 3.51.2; it needs two). Files have mode 0600.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from alchemist.server.errors import (
    LedgerCorrupt,
    LedgerError,
    LedgerFull,
    LedgerLocked,
    LedgerUnavailable,
)

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], T]

MAX_GROUP = 256
"""Operations in one transaction, at most."""


class Answer(Generic[T]):
    """What an operation will return: `await` it, or call `result()` where no event loop runs.

    The operation is queued when the answer is made, not when it is awaited. A cancelled wait takes a
    queued operation back, and leaves one that has begun.
    """

    def __init__(self, future: Future[T]) -> None:
        self.future = future

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self.future).__await__()

    def result(self, timeout: float | None = 30.0) -> T:
        """Blocks up to `timeout` seconds."""
        return self.future.result(timeout)


class _Job(NamedTuple):
    operation: Operation[Any]
    future: Future[Any]
    is_durable: bool


class Store:
    """An open database. `close` waits for what is queued."""

    def __init__(self, path: Path, migrations: Sequence[str]) -> None:
        """Opens or creates `path`; migration i brings the schema from version i to i + 1.

        Raises:
            LedgerLocked: another process has the directory.
            LedgerUnavailable: the directory or file cannot be made, read or written.
            LedgerCorrupt: the file is damaged, or its schema is newer than this release.
        """
        self.path = path.absolute()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._is_closed = False
        self._is_durable = True
        """How the writer's connection commits now."""
        self._gate = threading.Lock()
        try:
            self._lock_fd = _lock(self.path.parent)
            try:
                self._writer = _open_writer(self.path, migrations)
                self._reader = sqlite3.connect(
                    f"file:{_quote(self.path)}?mode=ro",
                    uri=True,
                    isolation_level=None,
                    check_same_thread=False,
                )
                self._reader.row_factory = sqlite3.Row
            except BaseException:
                # A signal, too, must not leave the directory locked.
                os.close(self._lock_fd)
                raise
        except (sqlite3.Error, OSError) as error:
            raise _translate(error, self.path) from error
        self._read_pool = ThreadPoolExecutor(1, thread_name_prefix="ledger-reader")
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    def write(self, operation: Operation[T], *, is_durable: bool = True) -> Answer[T]:
        """Queues `operation`; operations run in the order of these calls.

        Args:
            is_durable: False: what is stored outlives this process, but the machine's end only together with the next
                durable write.

        The answer raises what the operation raises, LedgerFull, or LedgerUnavailable; then nothing of it
        was stored.
        """
        future: Future[T] = Future()
        with self._gate:
            if self._is_closed:
                future.set_exception(LedgerUnavailable("the ledger is closed"))
            else:
                self._queue.put(_Job(operation, future, is_durable))
        return Answer(future)

    def read(self, operation: Operation[T]) -> Answer[T]:
        """Runs `operation` on the read-only connection, in one read transaction."""

        def run() -> T:
            try:
                self._reader.execute("BEGIN")
                try:
                    return operation(self._reader)
                finally:
                    self._reader.execute("ROLLBACK")
            except sqlite3.Error as error:
                raise _translate(error, self.path) from error

        with self._gate:
            if not self._is_closed:
                return Answer(self._read_pool.submit(run))
        closed: Future[T] = Future()
        closed.set_exception(LedgerUnavailable("the ledger is closed"))
        return Answer(closed)

    def close(self) -> None:
        """Finishes what is queued, then gives the directory back. Idempotent."""
        with self._gate:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put(None)
        self._read_pool.shutdown(wait=True)
        self._thread.join()
        self._reader.close()
        self._writer.close()
        os.close(self._lock_fd)

    def _run(self) -> None:
        while True:
            jobs = [self._queue.get()]
            while len(jobs) < MAX_GROUP and jobs[-1] is not None:
                try:
                    jobs.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            live = [job for job in jobs if job and job.future.set_running_or_notify_cancel()]
            if live:
                self._commit(live)
            if jobs[-1] is None:
                return

    def _commit(self, jobs: list[_Job]) -> None:
        try:
            outcomes = self._transaction(jobs)
        except sqlite3.Error as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._commit([job])
            else:
                jobs[0].future.set_exception(_translate(error, self.path))
            return
        for job, (value, raised) in zip(jobs, outcomes, strict=True):
            if raised is None:
                job.future.set_result(value)
            else:
                job.future.set_exception(raised)

    def _transaction(self, jobs: list[_Job]) -> list[tuple[Any, Exception | None]]:
        writer = self._writer
        outcomes: list[tuple[Any, Exception | None]] = []
        try:
            is_durable = any(job.is_durable for job in jobs)
            if is_durable != self._is_durable:
                writer.execute(f"PRAGMA synchronous={'FULL' if is_durable else 'NORMAL'}")
                self._is_durable = is_durable
            writer.execute("BEGIN IMMEDIATE")
            for job in jobs:
                writer.execute("SAVEPOINT job")
                try:
                    outcomes.append((job.operation(writer), None))
                except sqlite3.Error:
                    raise
                except Exception as error:
                    # Whatever the caller's operation raises is the caller's, in its answer.
                    writer.execute("ROLLBACK TO job")
                    outcomes.append((None, error))
                writer.execute("RELEASE job")
            writer.execute("COMMIT")
        except BaseException:
            # Nothing may leave a transaction open behind it: the next one would join it.
            # SQLite itself rolls back on some errors (full, I/O), not on others.
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            raise
        return outcomes


def _lock(directory: Path) -> int:
    # An existing directory keeps its mode: it may be shared, and the files in it are 0600.
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        raise LedgerLocked(
            f"data directory {directory} is in use by another server (process {owner or 'unknown'})"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _open_writer(path: Path, migrations: Sequence[str]) -> sqlite3.Connection:
    # SQLite gives -wal and -shm the mode of the database, so that is made first.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    os.chmod(path, 0o600)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise LedgerCorrupt(f"{path} is damaged: {problem}")
        _migrate(connection, path, migrations)
    except BaseException:
        # A signal, too: an open connection would hold the file.
        connection.close()
        raise
    _sync_directory(path.parent)
    return connection


def _migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(migrations):
        raise LedgerCorrupt(
            f"{path} has schema {version}; this release knows up to {len(migrations)}"
        )
    for number in range(version, len(migrations)):
        script = f"BEGIN IMMEDIATE; {migrations[number]} PRAGMA user_version={number + 1}; COMMIT;"
        try:
            connection.executescript(script)
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _quote(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _translate(error: Exception, path: Path) -> LedgerError:
    if isinstance(error, LedgerError):
        return error
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) == errno.ENOSPC:
        return LedgerFull(f"no space left for {path}")
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return LedgerCorrupt(f"{path} is damaged or is not a ledger: {error}")
    return LedgerUnavailable(f"cannot use {path}: {error}")
