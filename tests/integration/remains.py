"""What a server has, so that a test can see what is left of it."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import psutil
from live import Server, wait_for


class Footprint:
    """Processes, run directory, sockets and names in /dev/shm of a running server."""

    def __init__(self, server: Server) -> None:
        self.processes = [psutil.Process(server.process.pid), *server.children()]
        base = Path(tempfile.gettempdir())
        self.paths = set(base.glob(f"alchemist-{server.process.pid}-*"))
        self.listening: list[tuple[str, int]] = []
        for process in self.processes:
            try:
                self._add(process)
            except psutil.NoSuchProcess:
                continue

    def _add(self, process: psutil.Process) -> None:
        for mapped in process.memory_maps():
            if mapped.path.startswith("/dev/shm/") and "(deleted)" not in mapped.path:
                self.paths.add(Path(mapped.path))
        for connection in process.net_connections("unix"):
            if str(connection.laddr).startswith("/"):
                self.paths.add(Path(connection.laddr))
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                self.listening.append((connection.laddr.ip, connection.laddr.port))

    def remains(self) -> list[str]:
        """What of it is still there."""
        alive = [
            f"process {p.pid}"
            for p in self.processes
            if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        ]
        return alive + [str(path) for path in self.paths if path.exists()]

    def wait_gone(self, timeout: float = 30.0) -> None:
        """AssertionError that names what is left after `timeout` seconds."""
        try:
            wait_for(lambda: not self._remains(), timeout, "everything gone")
        except AssertionError:
            raise AssertionError(f"left behind: {self._remains()}") from None

    def _remains(self) -> list[str]:
        try:
            return self.remains()
        except psutil.NoSuchProcess:
            # It went between two questions; ask again.
            return ["a process"]


def query(data_dir: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """Rows of the ledger file, read without its server."""
    uri = f"file:{data_dir / 'ledger.sqlite3'}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
        return db.execute(sql, values).fetchall()


def assert_each_vote_trained_once(data_dir: Path, votes: set[str]) -> None:
    """Every acknowledged vote is in exactly one version that counts, by the ledger file itself."""
    trained = dict(query(data_dir, "SELECT id, version FROM feedback WHERE state = 'trained'"))
    assert set(trained) == votes
    rows = query(data_dir, "SELECT feedback_id, version FROM ledger")
    assert len(rows) == len(votes)
    assert dict(rows) == trained
    steps = dict(query(data_dir, "SELECT version, step FROM steps"))
    assert set(trained.values()) <= set(steps)
    failed = {
        row[0] for row in query(data_dir, "SELECT version FROM versions WHERE state='failed'")
    }
    assert not failed & set(trained.values())
