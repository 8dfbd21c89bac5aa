"""Asks the scheduler which recorded rows hold a prompt's tokens, and tells it when they were read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
import zmq

from alchemist.protocol import messages
from alchemist.trainer.rows import Recorded


class RowDesk:
    """A client of the scheduler's row desk. An answer that does not come costs a recomputation, nothing else."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, timeout: float = 2.0
    ) -> None:
        """Args:
        timeout: seconds to wait for an answer; the scheduler answers between two batches.
        """
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._timeout = timeout
        self._tickets = itertools.count(1)

    def check_out(
        self, prompts: Sequence[tuple[str | None, bytes]]
    ) -> tuple[int, list[Recorded | None]]:
        """Args:
            prompts: (radix namespace, packed token ids) each.

        Returns:
            A ticket for `check_in`, and for each prompt where its tokens are recorded, None where nowhere.
        """
        ticket = next(self._tickets)
        self._socket.send(messages.encode(messages.CheckOut(ticket=ticket, items=list(prompts))))
        answer = self._receive(ticket)
        if answer is None:
            return ticket, [None] * len(prompts)
        return ticket, [
            _recorded(len(prompt) // 4, *item)
            for (_, prompt), item in zip(prompts, answer.items, strict=True)
        ]

    def check_in(self, ticket: int) -> None:
        self._socket.send(messages.encode(messages.CheckIn(ticket=ticket)))

    def _receive(self, ticket: int) -> messages.CheckedOut | None:
        deadline = time.monotonic() + self._timeout
        while (left := deadline - time.monotonic()) > 0:
            if self._socket.poll(int(left * 1000) + 1):
                message = messages.decode_to_trainer(self._socket.recv())
                # A late answer to an earlier question is nobody's any more.
                if isinstance(message, messages.CheckedOut) and message.ticket == ticket:
                    return message
        return None


def _recorded(length: int, slots: bytes, rows: bytes, gens: bytes) -> Recorded | None:
    found = [
        torch.frombuffer(bytearray(data), dtype=torch.int64) if data else None
        for data in (rows, slots, gens)
    ]
    if found[0] is None or not bool((found[0] >= 0).any()):
        return None
    whole = [
        torch.full((length,), -1),
        torch.zeros(length, dtype=torch.int64),
        torch.zeros(length, dtype=torch.int64),
    ]
    for target, part in zip(whole, found, strict=True):
        assert part is not None
        target[: part.numel()] = part
    return Recorded(*whole)
