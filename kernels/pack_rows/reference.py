"""Plain torch: one token, one cell at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import Field


def pack_rows(
    fields: Sequence[Field], rows: Tensor, cells: Tensor, keys: Tensor, values: Tensor
) -> None:
    for token, row in enumerate(rows.tolist()):
        for value, first_cell in fields if row >= 0 else ():
            for number, part in enumerate(value[token].split(keys.shape[1]), start=first_cell):
                _cell(row, number, cells, keys, values)[: part.numel()] = part


def unpack_rows(
    fields: Sequence[Field], rows: Tensor, cells: Tensor, keys: Tensor, values: Tensor
) -> None:
    for token, row in enumerate(rows.tolist()):
        for value, first_cell in fields if row >= 0 else ():
            for number, part in enumerate(value[token].split(keys.shape[1]), start=first_cell):
                part.copy_(_cell(row, number, cells, keys, values)[: part.numel()])


def _cell(row: int, number: int, cells: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    half = cells.shape[1]
    plane, column = (keys, number) if number < half else (values, number - half)
    return plane[cells[row, column]]
