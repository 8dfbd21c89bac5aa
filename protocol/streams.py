"""Work on a GPU is enqueued and done later: points in that time, and copies that nobody waits for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Moment:
    """The end of what is enqueued on a GPU's current stream by now; on the CPU it has come."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def has_come(self) -> bool:
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Wait here, on the CPU."""
        if self._event is not None:
            self._event.synchronize()

    def before(self, device: torch.device) -> None:
        """What is enqueued on the device's current stream from now on waits."""
        if self._event is not None:
            torch.cuda.current_stream(device).wait_event(self._event)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values on the CPU once what is enqueued by now is complete; a tensor of the CPU is copied now."""
    if not tensor.is_cuda:
        return tensor.clone()
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
