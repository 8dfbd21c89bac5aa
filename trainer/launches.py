"""How far a GPU may be behind the trainer: a layer that is enqueued cannot be taken back when the lease is revoked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from alchemist.protocol.streams import Moment

AHEAD = 1
"""Layers enqueued behind the one that runs: enough for the device never to wait for Python, and what a revocation waits
for is two layers at most.
"""


class Launches:
    """Layers that are enqueued on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: deque[Moment] = deque()

    def bounded(self, gate: Callable[[], None]) -> Callable[[], None]:
        """`gate` for a device with its own time, to be called at the same layer boundaries: it comes after the layers
        that must be done before one more is enqueued, so what it knows of the lease is new.
        """

        def at_boundary() -> None:
            self._ends.append(Moment(self._device))
            while len(self._ends) > AHEAD:
                self._ends.popleft().wait()
            gate()

        return at_boundary

    def drain(self) -> None:
        """Wait until the device has done what is enqueued."""
        while self._ends:
            self._ends.popleft().wait()
