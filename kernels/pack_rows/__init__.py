"""Recorded rows in borrowed KV slots: one launch scatters a layer's activations, one gathers them.

A row is a run of cells. A cell is what one KV slot holds of keys (or of values) in one layer; row
`r` owns the slots `cells[r]`. Its first `slots_per_row` cells lie in the key buffer, one a slot,
the rest in the value buffer. A field begins at a whole cell, `first_cell`, and takes as many as its
width needs; what is left of its last cell is not written.

    cell j of row r  →  keys[cells[r, j]]            j < slots_per_row
                        values[cells[r, j − slots_per_row]]   otherwise

Bits are copied, never converted. The cells are views of SGLang's buffers in the activations' dtype
(`plane`), so a KV cache of a narrower dtype only has shorter cells.

On a GPU every shape is fixed at launch and rows and slots are read from device memory, so both
functions can be captured in a CUDA graph; a padded token has row −1. SGLang's fused kernels write
into their inputs: x and q must be packed before attention, attn, mid and gate_up after the MLP's
first product. That is two launches a layer, of the fields that exist by then.

Not run on a GPU yet. To be measured there: bytes a second against a plain copy of the same size.

Shapes: T tokens, C elements in a cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alchemist.kernels.dispatch import uses_triton

MAX_FIELDS = 6


class Field(NamedTuple):
    """One activation of T tokens, and where in a row it lies."""

    value: Tensor
    """[T, width], contiguous in the width."""
    first_cell: int
    """`RowLayout.fields[name][0] // RowLayout.cell`."""


def plane(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """One layer's K or V buffer [slots, n_kv, d] as cells [slots, C] of the activations' dtype: a view."""
    return buffer.flatten(1).view(dtype)


def pack_rows(
    fields: Sequence[Field], rows: Tensor, cells: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Store the fields of token i in row `rows[i]`.

    Args:
        fields: 1 to 6, of the planes' dtype.
        rows: int64 [T], each at most once; −1: the token is not recorded.
        cells: int64 [number of rows, slots_per_row], the slots of every row.
        keys, values: [slots, C] `plane`s of one layer, written in place.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(fields, rows, cells, keys, values)
    if uses_triton(keys):
        from . import triton

        triton.copy_rows(fields, rows, cells, keys, values, unpack=False)
        return
    (tokens,) = torch.where(rows >= 0)
    for value, start, stop, target, column in _cells(fields, cells.shape[1], keys, values):
        slots = cells[rows[tokens], column]
        target[slots, : stop - start] = value[tokens, start:stop]


def unpack_rows(
    fields: Sequence[Field], rows: Tensor, cells: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Read the fields of row `rows[i]` into token i's place in `fields`; of a row −1 nothing.

    Arguments as in `pack_rows`; a row may be asked for more than once.
    """
    _check(fields, rows, cells, keys, values)
    if uses_triton(keys):
        from . import triton

        triton.copy_rows(fields, rows, cells, keys, values, unpack=True)
        return
    (tokens,) = torch.where(rows >= 0)
    for value, start, stop, source, column in _cells(fields, cells.shape[1], keys, values):
        slots = cells[rows[tokens], column]
        value[tokens, start:stop] = source[slots, : stop - start]


def _cells(
    fields: Sequence[Field], half: int, keys: Tensor, values: Tensor
) -> Iterator[tuple[Tensor, int, int, Tensor, int]]:
    """(field, its columns from, to, the plane that holds them, column of `cells`), cell by cell."""
    size = keys.shape[1]
    for field in fields:
        width = field.value.shape[1]
        for number, start in enumerate(range(0, width, size), start=field.first_cell):
            stop = min(start + size, width)
            in_values = number >= half
            yield field.value, start, stop, values if in_values else keys, number % half


def _check(
    fields: Sequence[Field], rows: Tensor, cells: Tensor, keys: Tensor, values: Tensor
) -> None:
    if not 1 <= len(fields) <= MAX_FIELDS:
        raise ValueError(f"{len(fields)} fields given, allowed: 1 to {MAX_FIELDS}")
    if keys.shape != values.shape or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(
            f"planes must be contiguous and of one shape: {tuple(keys.shape)}, {tuple(values.shape)}"
        )
    if rows.dtype != torch.int64 or cells.dtype != torch.int64 or not cells.is_contiguous():
        raise ValueError(
            f"rows and cells must be int64 and contiguous: {rows.dtype}, {cells.dtype}"
        )
    room = 2 * cells.shape[1]
    for value, first_cell in fields:
        if value.dtype != keys.dtype:
            raise ValueError(f"a field is {value.dtype}, the planes are {keys.dtype}")
        if value.dim() != 2 or value.shape[0] != rows.shape[0] or value.stride(1) != 1:
            raise ValueError(
                f"a field is {tuple(value.shape)}, stride {value.stride()}; expected "
                f"[{rows.shape[0]}, width], contiguous in the width"
            )
        end = first_cell + -(-value.shape[1] // keys.shape[1])
        if first_cell < 0 or end > room:
            raise ValueError(f"a field takes cells {first_cell} to {end}, a row has {room}")
