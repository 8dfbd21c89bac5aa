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

    def check_out(self, prompts: Sequence[messages.Prompt]) -> tuple[int, list[Recorded | None]]:
        """A ticket for `check_in`, and for each prompt where its tokens are recorded, None where nowhere."""
        ticket = next(self._tickets)
        self._socket.send(messages.encode(messages.CheckOut(ticket=ticket, prompts=list(prompts))))
        answer = self._receive(ticket)
        if answer is None:
            return ticket, [None] * len(prompts)
        return ticket, [None if places is None else _recorded(places) for places in answer.places]

    def check_in(self, ticket: int) -> None:
        """Rows of that ticket have been read."""
        self._socket.send(messages.encode(messages.CheckIn(ticket=ticket)))

    def _receive(self, ticket: int) -> messages.CheckedOut | None:
        deadline = time.monotonic() + self._timeout
        # Looked at after the deadline, too: this process may have been stopped until then, with the answer there.
        while self._socket.poll(max(0, int((deadline - time.monotonic()) * 1000) + 1)):
            message = messages.decode_to_trainer(self._socket.recv())
            # A late answer to an earlier question is nobody's any more.
            if isinstance(message, messages.CheckedOut) and message.ticket == ticket:
                return message
        return None


def _recorded(places: messages.Places) -> Recorded:
    def ids(data: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.int64)

    return Recorded(
        ids(places.rows),
        ids(places.slots),
        ids(places.gens),
        (ids(places.hedge_rows), ids(places.hedge_gens)),
    )
