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
from typing import Any, NamedTuple

import numpy as np
import torch


class _Entry(NamedTuple):
    is_here: Any
    """A CUDA event."""
    values: tuple[torch.Tensor, ...]
    call: Callable[..., None]


class Arrivals:
    """One device's, on one thread."""

    def __init__(self, device: torch.device, counts: np.ndarray | None = None) -> None:
        """Args:
        counts: [2] int64, shared.
        """
        self._is_cuda = device.type == "cuda"
        self._counts = np.zeros(2, np.int64) if counts is None else counts
        self._entries: deque[_Entry] = deque()
        self._held: list[tuple[tuple[torch.Tensor, ...], Callable[..., None]]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def then(self, tensors: Sequence[torch.Tensor], call: Callable[..., None]) -> None:
        """Call `call(*tensors)`, with the tensors on the CPU, once their values are there, and after every earlier
        `then`. On the CPU: now.
        """
        if not self._is_cuda:
            call(*tensors)
            return
        self._counts[0] += 1
        self._append(tuple(_to_pinned(t) for t in tensors), call)

    def hold(self, tensors: Sequence[torch.Tensor], call: Callable[..., None]) -> None:
        """The same, but what is enqueued on the device until `go` must be complete, too."""
        if not self._is_cuda:
            call(*tensors)
            return
        self._counts[0] += 1
        self._held.append((tuple(_to_pinned(t) for t in tensors), call))

    def go(self) -> None:
        """What was held waits for no more than is enqueued on the current stream by now."""
        held, self._held = self._held, []
        for values, call in held:
            self._append(values, call)

    def settle(self, *, wait: bool = False) -> None:
        """Do what can be done; with `wait`, wait until all of it can."""
        while self._entries:
            entry = self._entries[0]
            if wait:
                entry.is_here.synchronize()
            elif not entry.is_here.query():
                return
            self._entries.popleft()
            entry.call(*entry.values)
            self._counts[1] += 1

    def _append(self, values: tuple[torch.Tensor, ...], call: Callable[..., None]) -> None:
        is_here = torch.cuda.Event()
        is_here.record()
        self._entries.append(_Entry(is_here, values, call))


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    out.copy_(tensor, non_blocking=True)
    # It may be freed, on the stream it was made on, before the copy has run.
    tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return out


def to_device(ids: np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers for the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(ids))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
