"""The row desk: the trainer asks the scheduler which rows hold a completion's tokens, and says when it has read them;
the HTTP process tells of votes.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
import zmq

from alchemist.protocol import messages
from alchemist.protocol.errors import ProtocolError
from alchemist.server.appraisal import Text
from alchemist.server.harmless import harmless
from alchemist.server.pool import ActivationPool, CheckedOut, Ids

logger = logging.getLogger(__name__)


class RowDesk:
    """Of one scheduler rank, on its thread. A question that is not answered costs a recomputation."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        tree: Any,
        pool: ActivationPool | None,
        *,
        flush: Callable[[], None],
        stop_recording: Callable[[Exception], None],
    ) -> None:
        """Args:
        socket: a ROUTER, bound.
        tree: SGLang's prefix cache.
        pool: None: nothing is recorded.
        flush: called before rows are given out: what waits to be copied into them has to be there.
        stop_recording: called with what has gone wrong.
        """
        self._socket, self._tree, self._pool = socket, tree, pool
        self._flush, self.stop_recording = flush, stop_recording
        self._tickets: dict[tuple[bytes, int], list[tuple[Ids, Ids]]] = {}

    def serve(self) -> None:
        """Answer what has been asked; never waits."""
        # Asked before every batch: an exception for nothing to read would cost more than the question.
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            peer, data = self._socket.recv_multipart(zmq.NOBLOCK)
            try:
                message = messages.decode_to_scheduler(data)
            except (ProtocolError, ValueError):
                logger.exception("row desk: a message was refused")
                continue
            answer = self.answer(peer, message)
            if answer is not None:
                self._socket.send_multipart([peer, messages.encode(answer)])

    @harmless(None)
    def answer(self, peer: bytes, message: Any) -> messages.CheckedOut | messages.RowStats | None:
        """What can be answered now."""
        if isinstance(message, messages.CheckOut):
            return self._check_out(peer, message)
        if isinstance(message, messages.AskRows):
            stats = self._pool.stats() if self._pool is not None else {}
            return messages.RowStats(ticket=message.ticket, stats=msgspec.json.encode(stats))
        if self._pool is None:
            return None
        if isinstance(message, messages.Voted):
            self._pool.voted(message.rid, time.monotonic())
        elif isinstance(message, messages.Fresh):
            self._pool.keep_fresh(message.lora_ids, time.monotonic())
        elif isinstance(message, messages.Trained):
            for rid in message.rids:
                self._pool.consumed(rid, time.monotonic())
        else:
            # After what it checks in, if that still waits for the device.
            self._pool.arrivals.then((), partial(self._check_in, (peer, message.ticket)))
        return None

    def _check_out(self, peer: bytes, message: messages.CheckOut) -> messages.CheckedOut | None:
        # A new trainer has a new identity: what a dead one held is given back here.
        for other in [key for key in self._tickets if key[0] != peer]:
            self._check_in(other)
        if self._pool is None:
            return messages.CheckedOut(ticket=message.ticket, places=[None] * len(message.prompts))
        self._flush()
        slots = [
            match_slots(self._tree, messages.unpack_ids(p.token_ids), p.extra_key)
            for p in message.prompts
        ]
        if not self._pool.arrivals.is_deferred:
            return self._find_places(peer, message, slots)
        self._pool.arrivals.then(slots, partial(self._send_places, peer, message))
        return None

    def _send_places(self, peer: bytes, message: messages.CheckOut, *slots: torch.Tensor) -> None:
        answer = self._find_places(peer, message, slots)
        self._socket.send_multipart([peer, messages.encode(answer)])

    def _find_places(
        self, peer: bytes, message: messages.CheckOut, slots: Sequence[torch.Tensor]
    ) -> messages.CheckedOut:
        """Args:
        slots: of each prompt's cached prefix, on the CPU.
        """
        assert self._pool is not None
        places: list[messages.Places | None] = []
        held = self._tickets.setdefault((peer, message.ticket), [])
        for prompt, own in zip(message.prompts, slots, strict=True):
            text = Text(np.frombuffer(prompt.token_ids, np.int32), prompt.extra_key)
            found = self._pool.check_out(prompt.rid, own, text.token_ids.size, text)
            held.append(found.ticket)
            places.append(_places(found) if (found.rows >= 0).any() else None)
        return messages.CheckedOut(ticket=message.ticket, places=places)

    def _check_in(self, key: tuple[bytes, int]) -> None:
        assert self._pool is not None
        for ticket in self._tickets.pop(key, ()):
            self._pool.check_in(ticket)


def has_prefixes(tree: Any) -> bool:
    """Whether `match_slots` can find anything."""
    from sglang.srt.mem_cache.radix_cache import RadixCache

    return isinstance(tree, RadixCache) and not tree.disable


def match_slots(tree: Any, token_ids: list[int], extra_key: str | None) -> torch.Tensor:
    """KV slots of the longest cached prefix, [n] int64, without touching the tree.

    `RadixCache.match_prefix` would refresh access times and split a node; a trainer's question must not change
    what serving evicts.
    """
    from sglang.srt.mem_cache.radix_cache import RadixKey

    parts: list[torch.Tensor] = []
    if has_prefixes(tree) and token_ids:
        page_size = tree.page_size
        key = RadixKey(array("q", token_ids), extra_key).page_aligned(page_size)
        node = tree.root_node
        while len(key):
            child = node.children.get(key.child_key(page_size))
            if child is None or child.value is None:
                break
            length = child.key.match(key, page_size=page_size)
            parts.append(child.value[:length])
            if length < len(child.key):
                break
            node, key = child, key[length:]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _places(found: CheckedOut) -> messages.Places:
    return messages.Places(
        slots=found.slots.tobytes(),
        rows=found.rows.tobytes(),
        gens=found.gens.tobytes(),
        hedge_rows=found.hedge_rows.tobytes(),
        hedge_gens=found.hedge_gens.tobytes(),
    )
