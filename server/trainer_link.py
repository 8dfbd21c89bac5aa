"""The server's end of the line to the trainer: its process, its handshake, and one step at a time."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

import zmq
import zmq.asyncio

from alchemist.protocol import messages
from alchemist.protocol.errors import PeerProtocolError
from alchemist.protocol.lease import Lease
from alchemist.server.errors import Unavailable
from alchemist.server.patience import Patience
from alchemist.server.trainer_process import TrainerProcess

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
MIN_START_S = 600.0
"""A trainer that starts imports and maps a lot, at low priority: it gets at least so long."""


_FAULTS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""By which a process ends that has done something wrong itself."""


class TrainerGone(Unavailable):
    """The trainer ended before it answered, or there is none.

    Attributes:
        crashed: it ended by its own fault.
        killed: something ended it: a person, the system when memory was short, or we because it did not get on. Whether
            the batch had to do with it nobody knows.
    """

    def __init__(self, reason: str, *, crashed: bool = False, killed: bool = False) -> None:
        super().__init__(reason)
        self.crashed, self.killed = crashed, killed


class TrainerLink:
    """Keeps a trainer running and speaks with the one that is ready."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: str,
        lease: Lease,
        lease_policy: str,
        timeout: float,
        welcome: Callable[[], messages.Welcome],
        on_ready: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        """Args:
        timeout: seconds that a step may not get on while the lease lets it.
        welcome: what a trainer that says hello is told.
        on_ready, on_end: called when a trainer has become ready, and when one has ended unasked.
        """
        self.process = TrainerProcess(address, lease_policy, self._ended)
        self.give_up: Callable[[str], None] = logger.critical
        """Ends the server, saying why."""
        self._lease = lease
        self._timeout = timeout
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
        self._tasks: list[asyncio.Task[None]] = []
        self._killed_for = ""
        """Why we have killed the trainer that has not ended yet."""

    @property
    def is_ready(self) -> bool:
        return self._peer is not None

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch())]
        self.process.start()

    async def stop(self) -> None:
        """Ask the trainer to end, then see that it does."""
        if self._peer is not None:
            await self._socket.send_multipart([self._peer, messages.encode(messages.Stop())])
        # A trainer that waits for the lease does not look at its messages.
        await self.process.stop(timeout=5.0 if self._peer else 0.5)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def step(self, request: messages.Train) -> messages.StepDone | messages.StepFailed:
        """Have one step done.

        Raises:
            TrainerGone: there is no trainer, or it ended first.
        """
        if self._peer is None:
            raise TrainerGone("there is no trainer now")
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

    async def _watch(self) -> None:
        """Kill a trainer that lives and does not get on. One that sleeps because the lease says so may do so for ever:
        time counts as far as the lease lets it run.
        """
        every, patience = min(1.0, self._timeout / 10), Patience()
        while True:
            await asyncio.sleep(every)
            pid, lease = self.process.pid, self._lease
            if pid is None or (self.is_ready and self._answer is None):
                # Nothing is owed.
                patience = Patience()
                continue
            limit = self._timeout if self.is_ready else max(self._timeout, MIN_START_S)
            mark = (pid, self.is_ready, lease.num_gates, lease.state)
            share = 1.0 if lease.is_granted else lease.share
            if patience.look(mark, every, share) < limit or self._killed_for:
                continue
            what = "a step" if self.is_ready else "its start"
            self._killed_for = f"the trainer made no progress in {what} for {limit:g} s"
            logger.error("%s; process %d is killed", self._killed_for, pid)
            self.process.kill()

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
            reason = self._killed_for or f"the trainer ended with status {code} during a step"
            crashed = code > 0 or -code in _FAULTS
            self._answer.set_exception(TrainerGone(reason, crashed=crashed, killed=not crashed))
        self._killed_for = ""
