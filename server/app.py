"""Joins SGLang's FastAPI app: our routes, the guard, readiness, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing.connection
import os
import signal
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from alchemist.server import processes
from alchemist.server.api import build_router
from alchemist.server.config import Config
from alchemist.server.learner import Learner
from alchemist.server.routes import RouteGuard, route_path

if TYPE_CHECKING:
    from alchemist.server.front import Front

logger = logging.getLogger("alchemist")

_ABORT_S = 2.0
"""How long aborted requests get to say so to their clients."""
_CONNECTIONS_S = 5
"""How long uvicorn waits for connections that are still open when all requests have ended."""
_DYING_S = 2.0


def install(app: FastAPI, front: Front, server_args: Any, manager: Any) -> None:
    """Add everything to `app` before uvicorn runs it."""
    assert front.run is not None
    assert front.lease is not None
    assert front.suspension is not None
    assert front.ledger is not None
    config = front.run.load_config()
    metrics = None
    if server_args.enable_metrics:
        # prometheus_client reads at import where SGLang wants its files; by now SGLang has said so.
        from alchemist.server.metrics import LearningMetrics

        metrics = LearningMetrics()
    learner = Learner(
        front.run, config, front.lease, front.suspension, front.ledger, manager, metrics
    )
    app.include_router(build_router(learner))
    app.add_middleware(Readiness, front=front, learner=learner)
    app.add_middleware(
        RouteGuard,
        routes=app.routes,
        host=server_args.host,
        is_training=not config.no_train,
        api_key=server_args.api_key,
        admin_api_key=server_args.admin_api_key,
    )
    theirs = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        manager.auto_create_handle_loop()
        ending = Ending(front, config, manager)
        ending.take_signals()
        learner.trainer.give_up = ending.end_now
        async with front.serving(learner), theirs(app) as state:
            yield state
        ending.stop_watchdog()

    app.router.lifespan_context = lifespan


class Readiness:
    """`/health` answers 503 until plugin and trainer are there; a server that is ending takes no new requests."""

    def __init__(self, app: ASGIApp, front: Front, learner: Learner) -> None:
        self.app, self._front, self._learner = app, front, learner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = route_path(scope)
            if self._front.is_ending and path != "/metrics":
                await _unavailable("the server is shutting down")(scope, receive, send)
                return
            if path in ("/health", "/health_generate", "/readiness") and not self._learner.is_ready:
                await _unavailable("the trainer is not ready")(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _unavailable(message: str) -> JSONResponse:
    body = {
        "error": {"message": message, "type": "service_unavailable", "param": None, "code": None}
    }
    return JSONResponse(body, status_code=503)


class Ending:
    """SIGINT and SIGTERM: no new requests, those in flight get --shutdown-timeout, then are aborted.

    SIGQUIT is how SGLang reports a child that has died: the whole server ends, with a message and status 1.
    """

    def __init__(self, front: Front, config: Config, manager: Any) -> None:
        self._front, self._config, self._manager = front, config, manager
        # uvicorn has installed its own handlers by now: methods of its server.
        self._uvicorn: Any = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        assert hasattr(self._uvicorn, "should_exit")
        self._task: asyncio.Task[None] | None = None

    def take_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGQUIT, self._on_dead_child)

    def stop_watchdog(self) -> None:
        """From here on children end because we end them."""
        if self._manager._subprocess_watchdog is not None:
            self._manager._subprocess_watchdog.stop()

    def _on_signal(self, number: int) -> None:
        if self._task is not None:
            logger.warning("second signal: requests in flight are aborted now")
            self._manager.abort_request(abort_all=True)
            return
        self._front.is_ending = True
        logger.info(
            "%s: shutting down; %d request(s) in flight have %.0f s",
            signal.Signals(number).name,
            self._front.num_in_flight,
            self._config.shutdown_timeout,
        )
        self._task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        if not await self._is_drained(self._config.shutdown_timeout):
            logger.warning("%d request(s) aborted at shutdown", self._front.num_in_flight)
            self._manager.abort_request(abort_all=True)
            await self._is_drained(_ABORT_S)
        # Not by its own signal handler: a second call of that would skip the end of the lifespan, and so ours.
        self._uvicorn.config.timeout_graceful_shutdown = _CONNECTIONS_S
        self._uvicorn.should_exit = True

    async def _is_drained(self, timeout: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._front.num_in_flight:
                    await asyncio.sleep(0.05)
        return self._front.num_in_flight == 0

    def _on_dead_child(self) -> None:
        self.stop_watchdog()
        self.end_now(self._dead_children())

    def end_now(self, reason: str) -> None:
        """Without the event loop: keep what is acknowledged, leave nothing behind, exit with status 1."""
        self.stop_watchdog()
        self._front.keep_all()
        processes.end_children()
        self._front.remove_run()
        logger.critical("%s; the server ends", reason)
        logging.shutdown()
        os._exit(1)

    def _dead_children(self) -> str:
        """Which of SGLang's processes have died, waiting a moment for one that is about to."""
        watchdog = self._manager._subprocess_watchdog
        named = list(zip(watchdog._names, watchdog._processes, strict=True)) if watchdog else []
        multiprocessing.connection.wait([process.sentinel for _, process in named], _DYING_S)
        dead = [
            f"{name} (process {process.pid}) has died with {_status(process.exitcode)}"
            for name, process in named
            if process.exitcode is not None
        ]
        return "SGLang's " + ", ".join(dead) if dead else "a process of SGLang has failed"


def _status(code: int) -> str:
    return f"status {code}" if code >= 0 else signal.Signals(-code).name
