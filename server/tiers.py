"""The two places where recorded rows lie: borrowed KV slots, and host memory. Both are shared with the trainer.

Here is where tensors are; what a row is, and how long, `pool.py` decides. A layout's fields begin at whole cells (see
`protocol.layout`), so a field of many rows is one gather or scatter of cells for each of the two KV buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from alchemist.protocol.layout import RowLayout
from alchemist.protocol.shm import TensorHandle
from alchemist.protocol.tensors import Arena
from alchemist.server.ids import Ids, IdStack
from alchemist.server.lender import Lender


class DeviceTier:
    """Rows in borrowed slots of the KV pool.

    Attributes:
        cells: [num_rows, slots_per_row] int64, shared: the slots of each row, or the last ones it had.
        spare: rows with borrowed slots that hold nothing.
    """

    def __init__(
        self,
        layout: RowLayout,
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        cells: Tensor,
        lender: Lender,
    ) -> None:
        """Args:
        k, v: SGLang's buffers, per layer [slots, n_kv, d].
        """
        self.layout, self._lender = layout, lender
        self.cells = cells.numpy()
        self.spare = IdStack(np.arange(0))
        self._without_slots = IdStack(np.arange(len(self.cells)))
        dtype = getattr(torch, layout.dtype)
        self._kv = list(zip(k, v, strict=True))
        self._planes = [tuple(t.flatten(1).view(dtype) for t in pair) for pair in self._kv]
        self._parts = {name: layout.parts(name) for name in layout.fields if name not in _KV}

    def borrow(self, count: int) -> None:
        """Have `count` spare rows, as far as slots can be borrowed; on a GPU they come a moment later."""
        size = self.layout.slots_per_row
        underway = self._lender.num_underway * self._lender.page_size // size
        missing = min(count - len(self.spare), len(self._without_slots)) - underway
        if missing > 0:
            self._lender.borrow(missing * size, size, self._borrowed)

    def _borrowed(self, slots: Ids) -> None:
        cells = slots.reshape(-1, self.layout.slots_per_row)
        rows = self._without_slots.pop(len(cells))
        self.cells[rows] = cells
        self.spare.push(rows)

    def take(self, count: int) -> Ids:
        """`count` spare rows, with neighbouring slots if so many are: one plain copy fills those."""
        size = self.layout.slots_per_row
        if count > 1:
            rows = self.spare.all()
            first = self.cells[rows, 0]
            if not (np.diff(first[-count:]) == size).all():
                order = np.argsort(first)
                first = first[order]
                spans = first[count - 1 :] - first[: first.size - count + 1]
                (runs,) = np.nonzero(spans == (count - 1) * size)
                start = int(runs[0]) if runs.size else first.size - count
                stop = start + count
                self.spare.reset(np.concatenate((rows[order[:start]], rows[order[stop:]])))
                self.spare.push(rows[order[start:stop]])
        return self.spare.pop(count)

    def give_back(self, count: int) -> Ids:
        """The pages of up to `count` spare rows, which have no slots then."""
        rows = self.spare.pop(min(count, len(self.spare)))
        self._without_slots.push(rows)
        return self.pages(rows).reshape(-1)

    def gone(self, rows: Ids) -> None:
        """Serving has the slots of these spare rows again."""
        self.spare.remove(rows)
        self._without_slots.push(rows)

    def pages(self, rows: Ids) -> Ids:
        """Of rows with slots, [n, pages of a row]."""
        size = self._lender.page_size
        pages: Ids = self.cells[rows][:, ::size] // size
        return pages

    def check_integrity(self, held: Ids) -> None:
        """AssertionError unless `held` and the rest are all rows, and borrowed slots are borrowed once."""
        unused = [*self.spare.all(), *self._without_slots.all()]
        assert sorted([*held, *unused]) == list(range(len(self.cells))), "device rows"
        lent = self.pages(np.sort([*held, *self.spare.all()]).astype(int)).reshape(-1)
        assert len(set(lent)) == lent.size, "a page borrowed twice"
        self._lender.check_integrity(lent)

    def write(self, layer: int, field: str, rows: Ids, value: Tensor) -> None:
        """Store a field as it is stored, [n, elements], in `rows` [n]."""
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
            index = slots[:, begin : begin + count].reshape(-1)
            _items(target)[index] = _items(part.reshape(-1, cell))

    def copy_kv_to(self, host: HostTier, slots: Ids, host_rows: Ids) -> None:
        """Copy keys and values of tokens' `slots` to the host: every layer."""
        own = torch.from_numpy(slots)
        for layer, (key_cells, value_cells) in enumerate(self._planes):
            host.write(layer, "keys", host_rows, key_cells.index_select(0, own))
            host.write(layer, "values", host_rows, value_cells.index_select(0, own))

    def copy_to(
        self, host: HostTier, rows: Ids, slots: Ids, host_rows: Ids, done: Callable[[], None]
    ) -> None:
        """Copy rows, and keys and values of their tokens' `slots`, to the host: every layer. Then call `done`."""
        cells = torch.from_numpy(self.cells[rows].reshape(-1))
        own, to = torch.from_numpy(slots), torch.from_numpy(host_rows)
        is_run = bool((np.diff(host_rows) == 1).all())
        for layer in range(len(self._planes)):
            target = host.data[layer]
            block = target[int(to[0]) : int(to[0]) + len(to)] if is_run else None
            out = (
                block
                if block is not None
                else torch.empty(len(to), self.layout.width, dtype=target.dtype)
            )
            self._gather(layer, cells, own, out)
            if block is None:
                target.index_copy_(0, to, out)
        done()

    def _gather(self, layer: int, cells: Tensor, own: Tensor, out: Tensor) -> None:
        """Rows as they lie on the host, from their cells and their tokens' own slots, into `out` [n, layout.width]."""
        key_cells, value_cells = self._planes[layer]
        cell, half = self.layout.cell, self.layout.slots_per_row
        keys, n = self.layout.fields["keys"][0], len(own)
        low = min(half * cell, keys)
        out[:, :low] = key_cells.index_select(0, cells).view(n, -1)[:, :low]
        out[:, low:keys] = value_cells.index_select(0, cells).view(n, -1)[:, : keys - low]
        out[:, keys : keys + cell] = key_cells.index_select(0, own)
        out[:, keys + cell :] = value_cells.index_select(0, own)


def _items(rows: Tensor) -> np.ndarray:
    """[n] items, each one of the contiguous `rows` [n, width]: NumPy moves an item as a block, and is six times as fast
    as torch's `index_copy_`.
    """
    items: np.ndarray = (
        rows.view(torch.uint8).numpy().view(f"V{rows.shape[1] * rows.element_size()}")[:, 0]
    )
    return items


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

    def write(self, layer: int, field: str, rows: Ids, value: Tensor) -> None:
        """Store a field as it is stored, [n, elements], in `rows` [n]."""
        start, width = self._fields[field]
        target = self.data[layer][:, start : start + width]
        if (np.diff(rows) == 1).all():
            target[int(rows[0]) : int(rows[0]) + len(rows)].copy_(value)
        else:
            target.index_copy_(0, torch.from_numpy(rows), value)

    def pin(self) -> None:
        """Lock the rows' pages, so that a GPU copies to them beside everything else."""
        self._arena.pin()

    @property
    def handles(self) -> list[TensorHandle]:
        return [self._arena.handles[str(layer)] for layer in range(len(self.data))]


_KV = ("keys", "values")
