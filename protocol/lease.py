"""The trainer's permission to use the device: a gate in shared memory and a semaphore to sleep on.

    offset  writer       field
    0       creator      magic
    8       front        front_busy        requests in flight in the HTTP process
    16      front        front_epoch       counts 0 → busy transitions
    24      front        front_since_ns    monotonic time of the last one
    32      scheduler    engine_busy       1 while requests wait or run in the scheduler
    40      scheduler    engine_epoch
    48      scheduler    engine_since_ns
    56      trainer      waiting           1 while the trainer sleeps on the semaphore
    64      trainer      state             TrainerState
    72      trainer      num_acks          revocations acknowledged while it was working
    80      trainer      latencies_ns[]    ring of the last `RING` revoke → acknowledge times
    ...     trainer      stretch_max_ns      longest stretch between two gates
    ...     trainer      num_missed        revocations that were over before the trainer's next gate
    ...     trainer      num_gates        gates passed: how far training has come
    ...     trainer      metered_ns        time it has run while requests were in flight
    ...     front        share_ppm         millionths of the time requests are in flight that the trainer may have
    ...     front        num_suspended     times the operating system has been told to put the trainer aside
    ...     any          sem_t             process-shared, posted when the device becomes free

The lease is granted exactly when both busy words are zero. Otherwise the trainer has the allowance of `allowance.py`,
from the share that the policy has set: 0 under `idle`, a constant under `share`, what the controller of
`server/slo.py` says under `slo`, all of the time under `none`. Every word has one writer, so there is nothing to lock:
a dead trainer holds nothing (once its process is gone, the front resets `waiting` and `state` for it), and a trainer
that outlives its server finds out by `alive`. States and their tables are in `states.py`. Times are CLOCK_MONOTONIC,
which all processes of a machine share. Words are aligned 8-byte stores.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

from alchemist.protocol import shm
from alchemist.protocol.allowance import Allowance
from alchemist.protocol.errors import PeerProtocolError
from alchemist.protocol.states import (
    LEASE,
    TRAINER,
    LeaseEvent,
    LeaseState,
    TrainerEvent,
    TrainerState,
)

RING = 4096
_MAGIC = 0x414C4348_4C454153
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Block(ctypes.Structure):
    _fields_ = (
        ("magic", ctypes.c_uint64),
        ("front_busy", ctypes.c_uint64),
        ("front_epoch", ctypes.c_uint64),
        ("front_since_ns", ctypes.c_uint64),
        ("engine_busy", ctypes.c_uint64),
        ("engine_epoch", ctypes.c_uint64),
        ("engine_since_ns", ctypes.c_uint64),
        ("waiting", ctypes.c_uint64),
        ("state", ctypes.c_uint64),
        ("num_acks", ctypes.c_uint64),
        ("latencies_ns", ctypes.c_uint64 * RING),
        ("stretch_max_ns", ctypes.c_uint64),
        ("num_missed", ctypes.c_uint64),
        ("num_gates", ctypes.c_uint64),
        ("metered_ns", ctypes.c_uint64),
        ("share_ppm", ctypes.c_uint64),
        ("num_suspended", ctypes.c_uint64),
        ("semaphore", ctypes.c_uint64 * 8),
    )


class Lease:
    """The control block. One process creates it; the others attach by handle."""

    def __init__(self, segment: shm.Segment) -> None:
        self.segment = segment
        self._block = _Block.from_buffer(segment.mapping)
        if self._block.magic != _MAGIC:
            raise PeerProtocolError("the shared segment is not a lease control block")
        self._semaphore = ctypes.c_void_p(ctypes.addressof(self._block) + _Block.semaphore.offset)
        self.changed: Callable[[], None] = lambda: None
        """Called in the HTTP process when requests in flight there, or the share, have changed."""

    @classmethod
    def create(cls) -> Lease:
        segment = shm.create("lease", ctypes.sizeof(_Block), populate=True)
        block = _Block.from_buffer(segment.mapping)
        block.magic = _MAGIC
        address = ctypes.addressof(block) + _Block.semaphore.offset
        if _libc.sem_init(ctypes.c_void_p(address), 1, 0) != 0:
            raise OSError(ctypes.get_errno(), "sem_init failed")
        return cls(segment)

    @classmethod
    def attach(cls, handle: shm.SegmentHandle) -> Lease:
        return cls(shm.attach(handle))

    @property
    def is_granted(self) -> bool:
        return bool(self._block.front_busy == 0 and self._block.engine_busy == 0)

    @property
    def front_busy(self) -> int:
        """Requests in flight in the HTTP process."""
        return int(self._block.front_busy)

    @property
    def state(self) -> TrainerState:
        return TrainerState(self._block.state)

    # the server's side: one store each

    def set_front_busy(self, num_requests: int) -> None:
        """HTTP process only: how many requests are in flight there."""
        block = self._block
        was = block.front_busy
        if num_requests and not was:
            block.front_since_ns = time.monotonic_ns()
            block.front_epoch += 1
        block.front_busy = num_requests
        if was and not num_requests:
            self._wake()
        self.changed()

    def set_engine_busy(self, busy: bool) -> None:
        """Scheduler process only: whether any request waits or runs."""
        block = self._block
        was = block.engine_busy
        if busy and not was:
            block.engine_since_ns = time.monotonic_ns()
            block.engine_epoch += 1
            block.engine_busy = 1
        elif was and not busy:
            block.engine_busy = 0
            self._wake()

    def set_share(self, share: float) -> None:
        """HTTP process only: the share, 0 to 1, of the time requests are in flight that the trainer may have."""
        self._block.share_ppm = round(share * 1e6)
        self.changed()

    def note_suspended(self) -> None:
        """HTTP process only: the trainer is put aside where it is, before its next gate."""
        self._block.num_suspended += 1

    @property
    def num_suspended(self) -> int:
        return int(self._block.num_suspended)

    @property
    def share(self) -> float:
        return float(self._block.share_ppm / 1e6)

    def _wake(self) -> None:
        if self._block.waiting:
            _libc.sem_post(self._semaphore)

    def reset_trainer(self) -> None:
        """Forget a trainer that has died, so that a new one starts from a clean block."""
        self._block.waiting = 0
        self.advance(TrainerEvent.DIED)

    def latencies_ms(self) -> list[float]:
        """Revoke → acknowledge times of the last `RING` revocations that met a working trainer, in ms, unordered."""
        count = min(self._block.num_acks, RING)
        return [self._block.latencies_ns[i] / 1e6 for i in range(count)]

    @property
    def num_acks(self) -> int:
        return int(self._block.num_acks)

    @property
    def num_missed(self) -> int:
        """Busy times that began and ended between two gates of a working trainer: it yielded to none of them. On a
        processor the operating system puts the trainer aside meanwhile.
        """
        return int(self._block.num_missed)

    @property
    def stretch_max_ms(self) -> float:
        """Longest stretch between two gates of a working trainer, in ms: the bound of a revocation."""
        return float(self._block.stretch_max_ns / 1e6)

    @property
    def num_gates(self) -> int:
        """Gates the trainers of this run have passed."""
        return int(self._block.num_gates)

    @property
    def metered_s(self) -> float:
        """Seconds the trainers of this run have worked while requests were in flight."""
        return float(self._block.metered_ns / 1e9)

    # the trainer's side

    def advance(self, event: TrainerEvent) -> None:
        """Move the trainer's state.

        Raises:
            LocalProtocolError: the event is not allowed in this state, which stays as it is.
        """
        self._block.state = TRAINER.step(self.state, event)

    def wait(self, timeout: float) -> bool:
        """Sleep until granted, at most `timeout` seconds; whether it is granted."""
        deadline = time.monotonic() + timeout
        self._block.waiting = 1
        try:
            while not self.is_granted:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                # A short sleep bounds what a missed wake-up can cost.
                self._sem_timedwait(min(left, 0.05))
            return True
        finally:
            self._block.waiting = 0

    def _sem_timedwait(self, seconds: float) -> None:
        until = time.time() + seconds
        spec = _Timespec(int(until), int(until % 1.0 * 1e9))
        _libc.sem_timedwait(self._semaphore, ctypes.byref(spec))

    def _revoked_since_ns(self) -> int:
        block = self._block
        stamps = []
        if block.front_busy:
            stamps.append(block.front_since_ns)
        if block.engine_busy:
            stamps.append(block.engine_since_ns)
        return min(stamps, default=0)

    def acknowledge(self, latency_ns: int) -> None:
        block = self._block
        block.latencies_ns[block.num_acks % RING] = max(0, latency_ns)
        block.num_acks += 1

    @property
    def epoch(self) -> int:
        """Changes whenever the lease is revoked."""
        return int(self._block.front_epoch + self._block.engine_epoch)

    def note_missed(self) -> None:
        self._block.num_missed += 1

    def note_gate(self, ns: int) -> None:
        block = self._block
        block.stretch_max_ns = max(block.stretch_max_ns, ns)
        block.num_gates += 1

    def note_metered(self, ns: int) -> None:
        self._block.metered_ns += ns


class Gate:
    """Called by the trainer at every layer boundary, on a CPU also between a layer's operations: returns at once while
    it may run, else acknowledges and sleeps.
    """

    def __init__(
        self,
        lease: Lease,
        alive: Callable[[], bool],
        drain: Callable[[], None] | None = None,
        on_state: Callable[[LeaseState], None] | None = None,
    ) -> None:
        """Args:
        alive: whether the server still lives; when not, the process ends.
        drain: waits until the device has done what is enqueued; the lease is not given up before. None: there is
            nothing to wait for.
        on_state: called when the state has changed.
        """
        self._lease = lease
        self._alive = alive
        self._drain = drain
        self._on_state = on_state
        self._allowance = Allowance()
        self.state = LEASE.initial
        self.waited_s = 0.0
        self.start()

    def start(self) -> None:
        """Begin a stretch of work: the time since the last one was not spent holding the device."""
        self._last_ns = time.monotonic_ns()
        self._epoch = self._lease.epoch
        self._num_suspended = self._lease.num_suspended

    def __call__(self) -> None:
        lease = self._lease
        now = time.monotonic_ns()
        # It has not run all the time since the last gate.
        stood = lease.num_suspended != self._num_suspended
        lease.note_gate(0 if stood else now - self._last_ns)
        if lease.is_granted:
            if lease.epoch != self._epoch and not stood:
                lease.note_missed()
            if self.state is not LeaseState.GRANTED:
                self._advance(LeaseEvent.FREED)
            self.start()
        elif self._may_go_on(now, stood):
            self.start()
        else:
            lease.advance(TrainerEvent.REVOKED)
            self._sleep()
            lease.advance(TrainerEvent.GRANTED)
            self.start()
            self.waited_s += (self._last_ns - now) / 1e9

    def _may_go_on(self, now: int, stood: bool) -> bool:
        """Requests are in flight: whether there is allowance left. If not, the revocation is acknowledged, unless the
        trainer has been put aside for it.
        """
        lease = self._lease
        since, share = lease._revoked_since_ns(), lease.share
        # One that came before we began to work, or after a sleep, has no latency.
        is_running = not stood and (self.state is LeaseState.METERED or since > self._last_ns)
        if self.state is LeaseState.GRANTED:
            self._advance(LeaseEvent.REQUESTED)
        # One may have come since we looked at the clock.
        ran_ns = 0 if stood else max(0, now - max(self._last_ns, since))
        beyond_s = self._allowance.ran(ran_ns / 1e9, share)
        lease.note_metered(ran_ns)
        if not self._allowance.is_spent(share):
            return True
        self._advance(LeaseEvent.SPENT)
        if self._drain is not None:
            self._drain()
            drained_ns = time.monotonic_ns() - now
            beyond_s += self._allowance.ran(drained_ns / 1e9, share)
            lease.note_metered(drained_ns)
        if is_running:
            lease.acknowledge(round(beyond_s * 1e9))
        return False

    def _sleep(self) -> None:
        """Until nothing is in flight, or a quantum has been earned."""
        allowance = self._allowance
        while True:
            share, began = self._lease.share, time.monotonic()
            timeout = min(0.5, allowance.until_earned(share))
            if timeout > 0 and self._lease.wait(timeout):
                self._advance(LeaseEvent.FREED)
                return
            allowance.waited(time.monotonic() - began, share)
            if allowance.until_earned(share) <= 0:
                self._advance(LeaseEvent.EARNED)
                return
            if not self._alive():
                os._exit(0)

    def _advance(self, event: LeaseEvent) -> None:
        self.state = LEASE.step(self.state, event)
        if self._on_state is not None:
            self._on_state(self.state)
