"""The trainer's life as the server sees it: started, watched, restarted with back-off, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable

logger = logging.getLogger(__name__)

_BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_HEALTHY_S = 60.0
"""A trainer that lived this long starts again without delay."""


class TrainerProcess:
    """Keeps one trainer running until `stop`."""

    def __init__(self, address: str, lease_policy: str, on_exit: Callable[[int], None]) -> None:
        """Args:
        address: where the trainer is to say hello.
        lease_policy: by it the trainer chooses its priority, before it does anything else.
        on_exit: called with the return code (negative: a signal) each time one ends unasked.
        """
        self._address = address
        self._lease_policy = lease_policy
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.returncode is None else None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_running())

    def kill(self) -> None:
        """End it at once, stopped or not; another one is started."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for it to end by itself, then kill it."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), timeout)
            except TimeoutError:
                self.kill()
                await self._process.wait()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _keep_running(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while not self._stopping:
            started = loop.time()
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "alchemist.trainer",
                    self._address,
                    str(os.getpid()),
                    self._lease_policy,
                    stdin=asyncio.subprocess.DEVNULL,
                )
            except OSError as error:
                # No memory, no process numbers, or no file descriptors left.
                logger.error("the trainer cannot be started: %s", error)
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
                failures += 1
                continue
            code = await self._process.wait()
            if self._stopping:
                return
            failures = 0 if loop.time() - started > _HEALTHY_S else failures + 1
            delay = _BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1] if failures else 0.0
            self.num_restarts += 1
            logger.warning(
                "the trainer ended with status %d; it is started again in %.1f s", code, delay
            )
            self._on_exit(code)
            await asyncio.sleep(delay)
