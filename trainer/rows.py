"""Recorded activations, read where serving left them.

`ActivationView` holds plain tensors: how they were mapped is somebody else's business. A row may be
taken away at any moment; its generation number then changes, so generations are compared *after*
the values have been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alchemist.protocol.layout import RowLayout


class RowsRevoked(RuntimeError):
    """Rows were reused while they were read: what was read is worthless. `rows` names them."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"{len(rows)} recorded rows were revoked, first: {rows[:4]}")
        self.rows = rows


@dataclass(frozen=True)
class Recorded:
    """Where a sample's prompt tokens are recorded. Three int64 tensors of the prompt's length, on
    the CPU.

    A row of −1 is a missing token (its slot and generation are ignored). Only recorded positions
    may be relied on; any subset may be missing.
    """

    rows: Tensor
    slots: Tensor
    gens: Tensor

    def __post_init__(self) -> None:
        if not self.rows.shape == self.slots.shape == self.gens.shape:
            raise ValueError(
                f"rows, slots and gens differ in length: {self.rows.numel()}, {self.slots.numel()}, {self.gens.numel()}"
            )


class ActivationView:
    """Borrowed tensors: the activation pool, the KV pool and the rows' generations.

    Args:
        pool: per layer [num_rows, layout.width].
        k, v: per layer [slots, n_kv, d]; keys after norm and rope.
        row_gen: [num_rows] int64; the writer changes a row's number when it takes the row away.
    """

    def __init__(
        self,
        layout: RowLayout,
        pool: Sequence[Tensor],
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        row_gen: Tensor,
    ) -> None:
        self.layout = layout
        self._pool, self._k, self._v, self._row_gen = pool, k, v, row_gen
        self._fields = layout.fields

    def fetch(self, layer: int, field: str, rows: Tensor, out: Tensor) -> None:
        """One field [n, field width] of `rows` into `out`. Call `check` after the last read."""
        start, width = self._fields[field]
        torch.index_select(self._pool[layer][:, start : start + width], 0, rows, out=out)

    def fetch_kv(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys and values [n, n_kv, d] of `slots` into `keys`, `values`."""
        torch.index_select(self._k[layer], 0, slots, out=keys)
        torch.index_select(self._v[layer], 0, slots, out=values)

    def check(self, rows: Tensor, gens: Tensor) -> None:
        """Raises RowsRevoked if any of `rows` is no longer of generation `gens`."""
        stale = self._row_gen[rows] != gens
        if bool(stale.any()):
            raise RowsRevoked(rows[stale].tolist())
