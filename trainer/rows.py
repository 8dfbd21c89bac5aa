"""Recorded activations, read where serving left them: in borrowed KV slots or in host memory.

`ActivationView` holds plain tensors: how they were mapped is somebody else's business. A row may be taken away at any
moment; its generation number then changes, so generations are compared *after* the values have been read.

A row number names a place: below `num_device` a row in KV slots, from there on a row on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from alchemist.kernels import fp8_rows
from alchemist.protocol.layout import RowLayout

_PIECE = 1 << 18
"""Elements gathered at a time where a field has to be put together."""


class RowsRevoked(RuntimeError):
    """Rows were reused while they were read: what was read is worthless. `rows` names them."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"{len(rows)} recorded rows were revoked, first: {rows[:4]}")
        self.rows = rows


@dataclass(frozen=True)
class Recorded:
    """Where a sample's tokens are recorded: its prompt's, or those and its response's but for the last one, which is
    predicted and never read. int64 tensors of that length, on the CPU.

    A row of −1 is a missing token (its slot and generation are ignored). Only recorded positions
    may be relied on; any subset may be missing.
    """

    rows: Tensor
    slots: Tensor
    """KV slots of the tokens; read for rows on the device only."""
    gens: Tensor
    hedge: tuple[Tensor, Tensor] | None = None
    """(rows, gens) of copies on the host, −1 where there is none: used where a row is taken away."""

    def __post_init__(self) -> None:
        if not self.rows.shape == self.slots.shape == self.gens.shape:
            raise ValueError(
                f"rows, slots and gens differ in length: {self.rows.numel()}, {self.slots.numel()}, {self.gens.numel()}"
            )

    def head(self, length: int) -> Recorded:
        """Of the first `length` tokens only."""
        hedge = self.hedge and (self.hedge[0][:length], self.hedge[1][:length])
        return Recorded(self.rows[:length], self.slots[:length], self.gens[:length], hedge)

    def without(self, gone: Tensor) -> Recorded:
        """The same without the rows `gone`: their copies on the host instead, where there are any."""
        lost = torch.isin(self.rows, gone)
        if self.hedge is None:
            return replace(self, rows=torch.where(lost, -1, self.rows))
        rows, gens = self.hedge
        kept = torch.where(torch.isin(rows, gone), -1, rows)
        return replace(
            self,
            rows=torch.where(lost, kept, self.rows),
            gens=torch.where(lost, gens, self.gens),
            hedge=(kept, gens),
        )


class _Places(NamedTuple):
    """Rows by tier. Positions are None where all rows are of one tier."""

    num_device: int
    at_device: Tensor | None
    cells: Tensor  # [device rows, slots_per_row]
    at_host: Tensor | None
    host_rows: Tensor


class ActivationView:
    """Borrowed tensors: what serving shares with the trainer.

    Args:
        host: per layer [host rows, layout.width].
        k, v: per layer [slots, n_kv, d]; keys after norm and rope. Contiguous: recorded rows lie in them, too.
        gens: [device rows + host rows] int64; the writer changes a row's number when it takes the row away.
        cells: [device rows, layout.slots_per_row] int64, the KV slots of every row on the device.
    """

    def __init__(
        self,
        layout: RowLayout,
        host: Sequence[Tensor],
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        gens: Tensor,
        cells: Tensor,
    ) -> None:
        self.layout = layout
        self.num_device = cells.shape[0]
        self._host, self._k, self._v, self._gens, self._cells = host, k, v, gens, cells
        self._fields = layout.fields
        self._parts = {name: layout.parts(name) for name in self._fields if name not in _ON_HOST}
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        self._planes = [
            tuple(t.flatten(1).view(self._dtype) for t in pair) for pair in zip(k, v, strict=True)
        ]
        self._last: tuple[Tensor, _Places] | None = None

    def fetch(self, layer: int, field: str, rows: Tensor, out: Tensor) -> None:
        """One field [n, `layout.widths`] of `rows` into `out`. Call `check` after the last read."""
        if not self.layout.is_encoded(field):
            self._read(layer, field, rows, out)
            return
        shape = (rows.numel(), self._fields[field][1])
        stored = torch.empty(shape, dtype=self._dtype, device=out.device)
        self._read(layer, field, rows, stored)
        fp8_rows.decode(stored, out)

    def _read(self, layer: int, field: str, rows: Tensor, out: Tensor) -> None:
        """One field as it is stored, [n, elements]."""
        start, width = self._fields[field]
        places = self._locate(rows)
        if places.num_device == 0:
            torch.index_select(
                self._host[layer][:, start : start + width], 0, places.host_rows, out=out
            )
            return
        n, cell = places.num_device, self.layout.cell
        for plane, first, count, offset in self._parts[field]:
            cells, source = places.cells[:, first : first + count], self._planes[layer][plane]
            if places.at_device is None and count * cell == width and out.is_contiguous():
                torch.index_select(source, 0, cells.reshape(-1), out=out.view(-1, cell))
                return
            columns = slice(offset, min(offset + count * cell, width))
            # In pieces that stay in the cache: a copy of the whole would be fresh memory, filled once and read once.
            rows_at_once = max(1, _PIECE // (count * cell))
            for begin in range(0, n, rows_at_once):
                piece = slice(begin, begin + rows_at_once)
                found = source.index_select(0, cells[piece].reshape(-1)).view(-1, count * cell)
                target = piece if places.at_device is None else places.at_device[piece]
                out[target, columns] = found[:, : width - offset]
        if places.at_host is not None:
            out[places.at_host] = self._host[layer][places.host_rows, start : start + width]

    def fetch_kv(
        self, layer: int, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Keys and values [n, n_kv, d] of `rows`, whose tokens are in `slots`, into `keys`, `values`."""
        places = self._locate(rows)
        for pool, field, out in (
            (self._k[layer], "keys", keys),
            (self._v[layer], "values", values),
        ):
            if places.num_device == rows.numel():
                if out.dtype == pool.dtype:
                    torch.index_select(pool, 0, slots, out=out)
                else:
                    out.copy_(pool.index_select(0, slots))
                continue
            start, width = self._fields[field]
            copy = self._host[layer][places.host_rows, start : start + width].view(pool.dtype)
            copy = copy.view(-1, *pool.shape[1:])
            if places.at_host is None:
                out.copy_(copy)
            else:
                out[places.at_host] = copy.to(out.dtype)
                out[places.at_device] = pool[slots[places.at_device]].to(out.dtype)

    def check(self, rows: Tensor, gens: Tensor) -> None:
        """Raises RowsRevoked if any of `rows` is no longer of generation `gens`."""
        stale = self._gens[rows] != gens
        if bool(stale.any()):
            raise RowsRevoked(rows[stale].tolist())

    def confirm(self) -> None:
        """Raises RowsRevoked if any of the rows that were checked since the last time had been taken away before they
        were read. Here `check` has said so.
        """

    def forget(self) -> None:
        """An attempt has failed: what was fetched for it is not wanted, and what was checked proves nothing."""

    def prefetch(self, layer: int, rows: Tensor) -> None:
        """`rows` of a layer, and then of those below it, will be fetched soon."""

    def _locate(self, rows: Tensor) -> _Places:
        # A batch asks for the same rows, field by field and layer by layer.
        if self._last is not None and self._last[0] is rows:
            return self._last[1]
        on_device = rows < self.num_device
        num_device = int(on_device.sum())
        if num_device in (0, rows.numel()):
            at_device = at_host = None
            mine, theirs = (rows, rows[:0]) if num_device else (rows[:0], rows)
        else:
            (at_device,), (at_host,) = torch.where(on_device), torch.where(~on_device)
            mine, theirs = rows[at_device], rows[at_host]
        # Where a row's cells are is read once, before its content and before `check`: a row that moves changes its
        # generation first.
        places = _Places(
            num_device, at_device, self._cells[mine], at_host, theirs - self.num_device
        )
        self._last = (rows, places)
        return places


_ON_HOST = ("keys", "values")
