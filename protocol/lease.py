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
    ...     trainer      layer_max_ns      longest stretch between two gates
    ...     trainer      num_missed        revocations that were over before the trainer's next gate
    ...     any          sem_t             process-shared, posted when the device becomes free

The lease is granted exactly when both busy words are zero. Every word has one writer, so there is nothing to lock: a
dead trainer holds nothing, and a trainer that outlives its server finds out by `alive`. Times are CLOCK_MONOTONIC,
which all processes of a machine share. Words are aligned 8-byte stores.
"""

from __future__ import annotations

import ctypes
import enum
import os
import time
from collections.abc import Callable

from alchemist.protocol import shm
from alchemist.protocol.errors import PeerProtocolError

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
        ("layer_max_ns", ctypes.c_uint64),
        ("num_missed", ctypes.c_uint64),
        ("semaphore", ctypes.c_uint64 * 8),
    )


class TrainerState(enum.IntEnum):
    """What the trainer is doing, as seen by everybody."""

    DETACHED = 0
    IDLE = 1
    RUNNING = 2
    YIELDED = 3


class Lease:
    """The control block. One process creates it; the others attach by handle."""

    def __init__(self, segment: shm.Segment) -> None:
        self.segment = segment
        self._block = _Block.from_buffer(segment.mapping)
        if self._block.magic != _MAGIC:
            raise PeerProtocolError("the shared segment is not a lease control block")
        self._semaphore = ctypes.c_void_p(ctypes.addressof(self._block) + _Block.semaphore.offset)

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

    def _wake(self) -> None:
        if self._block.waiting:
            _libc.sem_post(self._semaphore)

    def reset_trainer(self) -> None:
        """Forget a trainer that has died, so that a new one starts from a clean block."""
        self._block.waiting = 0
        self._block.state = TrainerState.DETACHED

    def latencies_ms(self) -> list[float]:
        """Revoke → acknowledge times of the last `RING` revocations that met a working trainer, in ms, unordered."""
        count = min(self._block.num_acks, RING)
        return [self._block.latencies_ns[i] / 1e6 for i in range(count)]

    @property
    def num_acks(self) -> int:
        return int(self._block.num_acks)

    @property
    def num_missed(self) -> int:
        """Busy times that began and ended within one layer of a working trainer: it yielded to none of them. On a
        processor the operating system puts the trainer aside meanwhile.
        """
        return int(self._block.num_missed)

    @property
    def layer_max_ms(self) -> float:
        """Longest stretch between two gates of a working trainer, in ms: the bound of a revocation."""
        return float(self._block.layer_max_ns / 1e6)

    # the trainer's side

    def set_state(self, state: TrainerState) -> None:
        self._block.state = state

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

    def note_stretch(self, ns: int) -> None:
        self._block.layer_max_ns = max(self._block.layer_max_ns, ns)


class Gate:
    """Called by the trainer at every layer boundary: returns at once while granted, else acknowledges and sleeps."""

    def __init__(self, lease: Lease, alive: Callable[[], bool]) -> None:
        """Args:
        alive: whether the server still lives; when not, the process ends.
        """
        self._lease = lease
        self._alive = alive
        self.waited_s = 0.0
        self.start()

    def start(self) -> None:
        """Begin a stretch of work: the time since the last one was not spent holding the device."""
        self._last_ns = time.monotonic_ns()
        self._epoch = self._lease.epoch

    def __call__(self) -> None:
        lease = self._lease
        now = time.monotonic_ns()
        if lease.is_granted:
            lease.note_stretch(now - self._last_ns)
            if lease.epoch != self._epoch:
                lease.note_missed()
            self.start()
            return
        since = lease._revoked_since_ns()
        # Only a revocation that came while we were working has a latency.
        if since > self._last_ns:
            lease.acknowledge(now - since)
        lease.note_stretch(now - self._last_ns)
        lease.set_state(TrainerState.YIELDED)
        while not lease.wait(timeout=0.5):
            if not self._alive():
                os._exit(0)
        lease.set_state(TrainerState.RUNNING)
        self.start()
        self.waited_s += (self._last_ns - now) / 1e9
