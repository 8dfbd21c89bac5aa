"""Values of device tensors on their way to the CPU: the scheduler's thread needs them, and may not wait for them.

The pool's tables are the CPU's, SGLang's slot numbers are the device's. Nothing in SGLang has them on the CPU: the
allocator, the request table and the radix tree hold device tensors, and a `.cpu()` would wait, because SGLang orders
its scheduling stream behind the forward pass. So the tensors are copied into pinned memory without waiting, and what is
to be done with them is done in the same order, a moment later: `settle`, called once a loop, looks how far the device
has come. On the CPU everything is done at once.

What this delays is the end of rows whose token's slot was freed: until it is settled their generation is the old one,
and the slot may already be serving's again. So both counts are in shared memory:

    counts[0]   ends that have begun: raised before anything else happens to the slots
    counts[1]   ends that have been settled

A reader takes counts[0] after its last read, waits until counts[1] has come as far, and only then compares generations.

Rows that are being recorded become known only when the pass that fills them is complete on the device (`hold`, `go`).
So whoever is told of a row, in a message, may read it: no event has to travel with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from alchemist.protocol.streams import Moment, copied


class _Entry(NamedTuple):
    is_here: Moment
    values: tuple[torch.Tensor, ...]
    call: Callable[..., None]


class Arrivals:
    """One device's, on one thread."""

    def __init__(
        self, device: torch.device, counts: np.ndarray, *, is_deferred: bool | None = None
    ) -> None:
        """Args:
        counts: [2] int64, shared.
        is_deferred: whether nothing is done before `settle`; None: on a GPU.
        """
        self.is_deferred = device.type == "cuda" if is_deferred is None else is_deferred
        self._device, self.counts = device, counts
        self._entries: deque[_Entry] = deque()
        self._held: list[tuple[tuple[torch.Tensor, ...], Callable[..., None]]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def then(self, tensors: Sequence[torch.Tensor], call: Callable[..., None]) -> None:
        """Call `call(*tensors)`, with the tensors on the CPU, once their values are there, and after every earlier
        `then`. On the CPU: now.
        """
        if not self.is_deferred:
            call(*tensors)
            return
        assert not self._held, "an arrival between hold and go"
        self.counts[0] += 1
        self._append(tuple(copied(t) for t in tensors), call)

    def hold(self, tensors: Sequence[torch.Tensor], call: Callable[..., None]) -> None:
        """The same, but what is enqueued on the device until `go` must be complete, too."""
        if not self.is_deferred:
            call(*tensors)
            return
        self.counts[0] += 1
        self._held.append((tuple(copied(t) for t in tensors), call))

    def go(self) -> None:
        """What was held waits for no more than is enqueued on the current stream by now."""
        held, self._held = self._held, []
        for values, call in held:
            self._append(values, call)

    def forget(self) -> None:
        """What is held will not be done."""
        self.counts[1] += len(self._held)
        self._held.clear()

    def settle(self, *, wait: bool = False) -> None:
        """Do what can be done; with `wait`, wait until all of it can."""
        while self._entries:
            entry = self._entries[0]
            if wait:
                entry.is_here.wait()
            elif not entry.is_here.has_come():
                return
            self._entries.popleft()
            try:
                entry.call(*entry.values)
            finally:
                self.counts[1] += 1

    def _append(self, values: tuple[torch.Tensor, ...], call: Callable[..., None]) -> None:
        self._entries.append(_Entry(Moment(self._device), values, call))
