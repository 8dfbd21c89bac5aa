"""Requests and their answers: which version answers, and how an answer becomes a completion one can vote on.

A request is seen three times, in an order nobody promises: `route` when it comes, `saw` at its first output, `finished`
when the scheduler reports it with tokens and logprobs. From `saw` or `finished` on, whichever is first, its id may be
voted on; a vote that comes before the tokens are stored waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from alchemist.protocol import messages
from alchemist.server.ledger import Ledger
from alchemist.server.publisher import PROBE_PREFIX, Publisher
from alchemist.server.records import Completion

logger = logging.getLogger(__name__)

_REPORT_S = 10.0
_SETTLE_S = 2.0
_NUM_REMEMBERED = 100_000


class Conversations:
    """Lives on the HTTP process's event loop."""

    def __init__(self, ledger: Ledger, publisher: Publisher, on_stored: Callable[[], None]) -> None:
        """Args:
        on_stored: called when a completion is in the ledger that had been voted on before.
        """
        self._ledger = ledger
        self._publisher = publisher
        self._on_stored = on_stored
        self._asked: dict[str, tuple[int, dict[str, Any]]] = {}
        """rid → (version, sampling parameters) of requests that have begun to answer."""
        self._recorded: dict[str, int] = {}

    def route(self, obj: Any) -> list[str]:
        """Set the adapter of a request (`obj.lora_path`); the names of the versions that will answer it.

        Raises:
            ValueError: it asks for a version that is not loaded.
        """
        if isinstance(obj.lora_path, list):
            if not obj.lora_path:
                raise ValueError("lora_path is []; allowed: one name for each prompt, or none")
            versions = [self._version_of(name) for name in obj.lora_path]
            obj.lora_path = [_adapter(version) for version in versions]
        else:
            versions = [self._version_of(obj.lora_path)]
            obj.lora_path = _adapter(versions[0])
        names = [f"v{version}" for version in versions]
        obj.alchemist_version = names[0]
        return names

    def _version_of(self, name: str | None) -> int:
        if name is None:
            return self._publisher.live
        if name in ("base", "v0"):
            return 0
        version = int(name[1:]) if name[:1] == "v" and name[1:].isdigit() else -1
        loaded = self._publisher.loaded
        if version not in loaded:
            has = ", ".join(["base", *(f"v{v}" for v in sorted(loaded))])
            raise ValueError(f"model {name!r} is not a version of this server; it has: {has}")
        return version

    def saw(self, rid: str, version: str, obj: Any) -> None:
        """A request has begun to answer."""
        if rid in self._asked or rid in self._recorded:
            return
        sampling = obj.sampling_params if isinstance(obj.sampling_params, dict) else {}
        self._asked[rid] = (int(version[1:]), sampling)
        self._ledger.mark_streaming(rid)

    def forget(self, rid: str) -> None:
        """A request's answer stream is over. If the scheduler has not reported it soon, it never will."""

        def drop() -> None:
            if self._asked.pop(rid, None) is not None:
                self._ledger.drop_completion(rid, "the request ended without an answer")

        if rid in self._asked:
            asyncio.get_running_loop().call_later(_REPORT_S, drop)

    def finished(self, message: messages.Finished) -> None:
        """The scheduler's report of a request."""
        version, sampling = self._asked.pop(message.rid, (None, {}))
        if message.rid.startswith(PROBE_PREFIX):
            return
        if message.lora_id is None:
            version = 0
        else:
            # Which adapter computed it, the scheduler knows.
            by_lora = {lora_id: v for v, lora_id in self._publisher.loaded.items()}
            version = by_lora.get(message.lora_id, version)
        if version is None:
            logger.error(
                "completion %s is not kept: its adapter is not loaded any more", message.rid
            )
            self._ledger.drop_completion(message.rid, "it is not known which version answered")
            return
        self._recorded[message.rid] = message.prompt_recorded
        if len(self._recorded) > _NUM_REMEMBERED:
            self._recorded.pop(next(iter(self._recorded)))
        # Open until it is stored, also when this report is ahead of the answer's first chunk.
        self._ledger.mark_streaming(message.rid)
        answer = self._ledger.add_completion(
            Completion(
                id=message.rid,
                version=version,
                prompt_ids=messages.unpack_ids(message.prompt_ids),
                response_ids=messages.unpack_ids(message.output_ids),
                response_logprobs=messages.unpack_floats(message.logprobs),
                model=f"v{version}",
                sampling=sampling,
                finish_reason=message.finish_reason,
                extra_key=message.extra_key,
                state="aborted" if message.finish_reason == "abort" else "done",
            )
        )
        answer.future.add_done_callback(partial(self._stored, asyncio.get_running_loop()))

    def _stored(self, loop: asyncio.AbstractEventLoop, future: Future[int]) -> None:
        """On the ledger's thread."""
        if not future.cancelled() and future.exception() is None and future.result():
            with contextlib.suppress(RuntimeError):
                # The loop may have ended.
                loop.call_soon_threadsafe(self._on_stored)

    async def settle(self, rid: str) -> None:
        """Wait, at most `_SETTLE_S`, for the ledger to have a completion whose answer was just given."""
        deadline = time.monotonic() + _SETTLE_S
        while self._ledger.is_open(rid) and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    def num_recorded(self, rid: str) -> int:
        """Prompt tokens of a completion that had a row when it ended; 0 for one of an earlier run."""
        return self._recorded.get(rid, 0)


def _adapter(version: int) -> str | None:
    return f"v{version}" if version else None
