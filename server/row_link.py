"""The server's end of the line to the scheduler's row desk: tells of votes, asks how the activation pool is."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from alchemist.protocol import messages


class RowLink:
    """A DEALER; what it sends before the scheduler listens waits. Lives on the HTTP process's event loop."""

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._asking = asyncio.Lock()
        self._tickets = itertools.count(1)

    async def voted(self, rid: str) -> None:
        """A vote on a completion is on disk."""
        await self._socket.send(messages.encode(messages.Voted(rid=rid)))

    async def trained(self, rids: list[str]) -> None:
        """Votes on these completions have been trained, or cannot be."""
        await self._socket.send(messages.encode(messages.Trained(rids=rids)))

    async def fresh(self, lora_ids: list[str]) -> None:
        """Rows of these adapters' answers, and of no others, can still be trained from; "": the base model."""
        await self._socket.send(messages.encode(messages.Fresh(lora_ids=lora_ids)))

    async def stats(self, timeout: float = 1.0) -> dict[str, Any]:
        """See `ActivationPool.stats`; empty when nothing is recorded, or when the scheduler, which answers between two
        batches, has not answered within `timeout` seconds.
        """
        ticket = next(self._tickets)
        deadline = time.monotonic() + timeout
        async with self._asking:
            await self._socket.send(messages.encode(messages.AskRows(ticket=ticket)))
            while (left := deadline - time.monotonic()) > 0:
                if not await self._socket.poll(int(left * 1000) + 1):
                    break
                answer = messages.decode_to_main(await self._socket.recv())
                # A late answer to an earlier question is nobody's any more.
                if isinstance(answer, messages.RowStats) and answer.ticket == ticket:
                    stats: dict[str, Any] = msgspec.json.decode(answer.stats)
                    return stats
        return {}
