"""The device tier on a GPU, which has its own time: what is asked of it is done later, in the order of a stream.

Rows are written by `gpu_recorder.py`, by their number: the table of their slots lies on the device, too. Copies to the
host go on a stream of their own, beside serving's. They read rows that serving may take back at any moment; what was
copied is a copy only if the row still is what it was when the stream is done.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alchemist.protocol.layout import RowLayout
from alchemist.protocol.streams import Moment, to_device
from alchemist.server.ids import Ids
from alchemist.server.lender import Lender
from alchemist.server.staging import STAGING_BYTES, Staging
from alchemist.server.tiers import DeviceTier, HostTier

MAX_COPIES = 2
"""Portions on their way to the host. The link is busy with one while the next is prepared."""


class GpuTier(DeviceTier):
    """Attributes:
    table: `cells` on the device.
    staging: rows of a pass that found no slot.
    kept: tensors to be held for as long as this is.
    """

    def __init__(
        self,
        layout: RowLayout,
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        cells: Tensor,
        lender: Lender,
        *,
        num_host_rows: int,
    ) -> None:
        super().__init__(layout, k, v, cells, lender)
        self._device = k[0].device
        num_staged = min(num_host_rows, STAGING_BYTES // layout.row_bytes)
        self.staging = Staging(layout, num_staged, self._device)
        self.table = torch.zeros(cells.shape, dtype=torch.int64, device=self._device)
        self._side: Any = None
        if k[0].is_cuda:
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self.kept: list[Tensor] = []
        self._copies: deque[tuple[Moment, Callable[[], None]]] = deque()

    def _borrowed(self, slots: Ids) -> None:
        before = len(self.spare)
        super()._borrowed(slots)
        rows = self.spare.all()[before:]
        if rows.size:
            to = to_device(rows, self._device)
            self.table.index_copy_(0, to, to_device(self.cells[rows], self._device))

    def take(self, count: int) -> Ids:
        """`count` spare rows."""
        return self.spare.pop(count)

    def write(self, layer: int, field: str, rows: Ids, value: Tensor) -> None:
        """Store a field as it is stored, [n, elements], in `rows` [n]; enqueued on the current stream."""
        # Not before: the CPU's pool has no use for it.
        from alchemist.kernels.pack_rows import Field, pack_rows

        start, _ = self.layout.fields[field]
        fields = [Field(value, start // self.layout.cell)]
        pack_rows(fields, to_device(rows, self._device), self.table, *self.plane(layer))

    def plane(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as cells, [slots, cell] each."""
        keys, values = self._planes[layer]
        return keys, values

    @property
    def num_copies(self) -> int:
        """Portions on their way to the host."""
        return len(self._copies)

    def copy_to(
        self, host: HostTier, rows: Ids, slots: Ids, host_rows: Ids, done: Callable[[], None]
    ) -> None:
        """Begin to copy rows, and keys and values of their tokens' `slots`, to the host. `finish_copies` calls `done`
        when they are there: whatever they have become meanwhile.
        """
        with self._aside():
            cells = to_device(self.cells[rows].reshape(-1), self._device)
            own = to_device(slots, self._device)
            out = torch.empty(
                len(rows), self.layout.width, dtype=host.data[0].dtype, device=self._device
            )
            for layer, target in enumerate(host.data):
                self._gather(layer, cells, own, out)
                _copy_runs(out, target, host_rows)
            self._copies.append((Moment(self._device), done))

    def send_staged(
        self, host: HostTier, slots: Tensor, host_rows: Ids, done: Callable[[], None]
    ) -> None:
        """Begin to copy the staged rows, whose tokens are in `slots` (on the device), to the host, when the pass that
        is enqueued is complete. As `copy_to`.
        """
        staged, n = self.staging, len(host_rows)
        keys, cell = self.layout.fields["keys"][0], self.layout.cell
        for rows, (key_cells, value_cells) in zip(staged.rows, self._planes, strict=True):
            rows[:n, keys : keys + cell] = key_cells[slots]
            rows[:n, keys + cell :] = value_cells[slots]

        def arrived() -> None:
            staged.is_free = True
            done()

        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
        with self._aside():
            for rows, target in zip(staged.rows, host.data, strict=True):
                _copy_runs(rows, target, host_rows)
            self._copies.append((Moment(self._device), arrived))

    def _aside(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._side) if self._side else contextlib.nullcontext()

    def finish_copies(self, *, wait: bool = False) -> None:
        """Call `done` of copies that are complete; with `wait`, wait for the oldest one."""
        while self._copies and (wait or self._copies[0][0].has_come()):
            moment, done = self._copies.popleft()
            moment.wait()
            wait = False
            done()


def _copy_runs(source: Tensor, target: Tensor, rows: Ids) -> None:
    """Copy the first rows of `source` to the ascending `rows` of `target`: a copy for each run of neighbours."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for begin, end in zip([0, *breaks], [*breaks, len(rows)], strict=True):
        first = int(rows[begin])
        target[first : first + end - begin].copy_(source[begin:end], non_blocking=True)
