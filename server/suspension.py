"""On a CPU the operating system puts the trainer aside the moment a request comes, in the middle of an operation.

A gate of the lease comes milliseconds after a request. Until then the trainer's threads take their part of the cores
and of the caches; in the lowest scheduling class they take it for longer, from every gap between serving's own steps.
So the process that serves HTTP, to which requests come first, stops the trainer (SIGSTOP), and continues it when they
are answered. This is besides the lease: a trainer that nobody stops, and one that is continued while a request is still
in the scheduler, yields at its next gate.

Stopped is only a trainer that works and has no share of the time requests are in flight. Only its parent may do it: a
child's process number is nobody else's before the parent has waited for it. What a GPU has been given would go on, so
there the gates are all there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable

from alchemist.protocol.lease import RING, Lease
from alchemist.protocol.states import TrainerState

LOOKS = 16
"""How often it is looked at once whether the trainer has stopped, some microseconds each; then by the loop."""
AGAIN_S = 0.001


class Suspension:
    """One event loop's trainer; follows the lease by itself."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        lease.changed = self._follow
        self._pid: Callable[[], int | None] = lambda: None
        self._stopped: int | None = None
        self._since_ns: int | None = None
        """When it was told to stand still; None: it does, or was not told."""
        self._latencies_ns: deque[int] = deque(maxlen=RING)

    def attach(self, pid: Callable[[], int | None]) -> None:
        """From now on there is a trainer that may be stopped.

        Args:
            pid: its process number while it lives; a child of this process.
        """
        self._pid = pid

    def end(self) -> None:
        """The trainer goes on, if it was stopped here."""
        pid, self._stopped = self._stopped, None
        if pid is not None and pid == self._pid():
            # One that was not seen to stand by now took at least as long.
            self._note()
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)

    def latencies_ms(self) -> list[float]:
        """From a request's arrival until the trainer stood still, of the last times, unordered."""
        return [ns / 1e6 for ns in self._latencies_ns]

    def _follow(self) -> None:
        lease = self._lease
        if not lease.front_busy or lease.share:
            self.end()
        elif self._stopped is None and lease.state is TrainerState.RUNNING:
            self._stop()

    def _stop(self) -> None:
        pid = self._pid()
        if pid is None:
            return
        with contextlib.suppress(OSError):
            self._lease.note_suspended()
            since = time.monotonic_ns()
            os.kill(pid, signal.SIGSTOP)
            self._stopped, self._since_ns = pid, since
            self._look(pid, LOOKS)

    def _look(self, pid: int, times: int = 1) -> None:
        """Note when all of its threads stand still: a thread in the middle of a write to disk takes a while."""
        for _ in range(times):
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG) is not None:
                    self._note()
        if self._since_ns is not None and pid == self._stopped == self._pid():
            asyncio.get_running_loop().call_later(AGAIN_S, self._look, pid)

    def _note(self) -> None:
        if self._since_ns is not None:
            self._latencies_ns.append(time.monotonic_ns() - self._since_ns)
            self._since_ns = None
