"""The two places where recorded rows lie: borrowed KV slots, and host memory. Both are shared with the trainer.

Here is where tensors are; what a row is, and how long, `pool.py` decides. A layout's fields begin at whole cells (see
`protocol.layout`), so a field of many rows is one gather or scatter of cells for each of the two KV buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alchemist.protocol.layout import RowLayout
from alchemist.protocol.shm import TensorHandle
from alchemist.protocol.tensors import Arena


class DeviceTier:
    """Rows in borrowed slots of the KV pool.

    Attributes:
        cells: [num_rows, slots_per_row] int64, shared: the slots of each row, −1 while it has none.
    """

    def __init__(
        self, layout: RowLayout, k: Sequence[Tensor], v: Sequence[Tensor], cells: Tensor
    ) -> None:
        """Args:
        k, v: SGLang's buffers, per layer [slots, n_kv, d].
        """
        self.layout = layout
        self.cells = cells.numpy()
        dtype = getattr(torch, layout.dtype)
        self._kv = list(zip(k, v, strict=True))
        self._planes = [tuple(t.flatten(1).view(dtype) for t in pair) for pair in self._kv]
        self._parts = {name: layout.parts(name) for name in layout.fields if name not in _KV}

    def write(self, layer: int, field: str, rows: np.ndarray, value: Tensor) -> None:
        """Store [n, field width] in `rows` [n]."""
        cell, slots = self.layout.cell, self.cells[rows]
        first = int(slots[0, 0])
        # Neighbouring slots are one plain copy, several times faster than a scatter.
        is_run = bool((np.diff(slots.reshape(-1)) == 1).all())
        for plane, begin, count, offset in self._parts[field]:
            target = self._planes[layer][plane]
            part = value[:, offset : offset + count * cell]
            if is_run:
                run = target[first : first + slots.size].view(len(rows), -1)
                run[:, begin * cell : begin * cell + part.shape[1]].copy_(part)
                continue
            padding = count * cell - part.shape[1]
            if padding:
                part = torch.nn.functional.pad(part, (0, padding))
            index = torch.from_numpy(slots[:, begin : begin + count].reshape(-1))
            target.index_copy_(0, index, part.reshape(-1, cell))

    def copy_kv_to(self, host: HostTier, slots: np.ndarray, host_rows: np.ndarray) -> None:
        """Copy keys and values of tokens' `slots` to the host: every layer."""
        own = torch.from_numpy(slots)
        for layer, (key_cells, value_cells) in enumerate(self._planes):
            host.write(layer, "keys", host_rows, key_cells[own])
            host.write(layer, "values", host_rows, value_cells[own])

    def copy_to(
        self, host: HostTier, rows: np.ndarray, slots: np.ndarray, host_rows: np.ndarray
    ) -> None:
        """Copy rows, and keys and values of their tokens' `slots`, to the host: every layer."""
        cell, half = self.layout.cell, self.layout.slots_per_row
        keys, end = self.layout.fields["keys"][0], self.layout.width
        cells = torch.from_numpy(self.cells[rows].reshape(-1))
        own, to = torch.from_numpy(slots), torch.from_numpy(host_rows)
        is_run = bool((np.diff(host_rows) == 1).all())
        for layer, (key_cells, value_cells) in enumerate(self._planes):
            target = host.data[layer]
            block = target[int(to[0]) : int(to[0]) + len(to)] if is_run else None
            out = block if block is not None else torch.empty(len(to), end, dtype=target.dtype)
            low = min(half * cell, keys)
            out[:, :low] = key_cells[cells].view(len(to), -1)[:, :low]
            out[:, low:keys] = value_cells[cells].view(len(to), -1)[:, : keys - low]
            out[:, keys : keys + cell] = key_cells[own]
            out[:, keys + cell :] = value_cells[own]
            if block is None:
                target.index_copy_(0, to, out)


class HostTier:
    """Rows in host memory: `[num_rows, layout.width]` per layer, keys and values included."""

    def __init__(self, layout: RowLayout, num_rows: int) -> None:
        self.num_rows = num_rows
        self._fields = layout.fields
        dtype = getattr(torch, layout.dtype)
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            str(layer): ((num_rows, layout.width), dtype) for layer in range(layout.num_layers)
        }
        self._arena = Arena("rows", specs, populate=True)
        self.data = [self._arena.tensors[str(layer)] for layer in range(layout.num_layers)]

    def write(self, layer: int, field: str, rows: np.ndarray, value: Tensor) -> None:
        """Store [n, field width] in `rows` [n]."""
        start, width = self._fields[field]
        target = self.data[layer][:, start : start + width]
        if (np.diff(rows) == 1).all():
            target[int(rows[0]) : int(rows[0]) + len(rows)].copy_(value)
        else:
            target.index_copy_(0, torch.from_numpy(rows), value)

    @property
    def handles(self) -> list[TensorHandle]:
        return [self._arena.handles[str(layer)] for layer in range(len(self.data))]


_KV = ("keys", "values")
