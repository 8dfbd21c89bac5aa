"""The server's end of the line to the trainer: its process, its handshake, and one step at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio

from alchemist.protocol import messages
from alchemist.protocol.errors import PeerProtocolError
from alchemist.protocol.lease import Lease
from alchemist.server.errors import Unavailable
from alchemist.server.trainer_process import TrainerProcess

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3


class TrainerGone(Unavailable):
    """The trainer ended before it answered; `crashed`: by its own fault, not by a signal."""

    def __init__(self, crashed: bool) -> None:
        super().__init__("the trainer ended during a step")
        self.crashed = crashed


class TrainerLink:
    """Keeps a trainer running and speaks with the one that is ready."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        lease: Lease,
        lease_policy: str,
        welcome: Callable[[], messages.Welcome],
        on_ready: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """Args:
        welcome: what a trainer that says hello is told.
        on_ready, on_end: called when a trainer has become ready, and when one has ended unasked.
        """
        self.process = TrainerProcess(address, lease_policy, self._ended)
        self.give_up: Callable[[str], None] = logger.critical
        """Ends the server, saying why."""
        self._lease = lease
        self._welcome = welcome
        self._on_ready = on_ready
        self._on_end = on_end
        self._failed_starts: int | None = 0
        """In a row; None: a trainer has been ready once."""
        self._socket = context.socket(zmq.ROUTER)
        self._socket.bind(address)
        self._peer: bytes | None = None
        """The trainer that is ready, by its socket identity."""
        self._answer: asyncio.Future[messages.StepDone | messages.StepFailed] | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        return self._peer is not None

    def start(self) -> None:
        self._listening = asyncio.create_task(self._listen())
        self.process.start()

    async def stop(self) -> None:
        """Ask the trainer to end, then see that it does."""
        if self._peer is not None:
            await self._socket.send_multipart([self._peer, messages.encode(messages.Stop())])
        # A trainer that waits for the lease does not look at its messages.
        await self.process.stop(timeout=5.0 if self._peer else 0.5)
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)

    async def step(self, request: messages.Train) -> messages.StepDone | messages.StepFailed:
        """Have one step done.

        Raises:
            TrainerGone: there is no trainer, or it ended first.
        """
        if self._peer is None:
            raise TrainerGone(crashed=False)
        self._answer = asyncio.get_running_loop().create_future()
        try:
            await self._socket.send_multipart([self._peer, messages.encode(request)])
            return await self._answer
        finally:
            self._answer = None

    async def _listen(self) -> None:
        while True:
            peer, data = await self._socket.recv_multipart()
            try:
                message = messages.decode_to_main(data)
            except PeerProtocolError:
                logger.exception("a message of the trainer was refused")
                continue
            if isinstance(message, messages.TrainerHello):
                await self._socket.send_multipart([peer, messages.encode(self._welcome())])
            elif isinstance(message, messages.TrainerReady):
                self._peer = peer
                self._failed_starts = None
                megabytes = message.weights_shared_bytes / 1e6
                logger.info(
                    "trainer %d is ready; it maps %.1f MB of base weights", message.pid, megabytes
                )
                self._on_ready()
            elif (
                isinstance(message, messages.StepDone | messages.StepFailed)
                # The last words of a trainer that has died since are about another batch.
                and peer == self._peer
                and self._answer is not None
                and not self._answer.done()
            ):
                self._answer.set_result(message)

    def _ended(self, code: int) -> None:
        self._peer = None
        self._lease.reset_trainer()
        self._on_end()
        if code > 0 and self._failed_starts is not None:
            self._failed_starts += 1
            if self._failed_starts == MAX_FAILED_STARTS:
                self.give_up(
                    "the trainer cannot start, for the reason above; "
                    "add --no-train to serve without learning"
                )
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(TrainerGone(crashed=code > 0))
