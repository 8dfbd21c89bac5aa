"""Triton: one program copies a few neighbouring cells of one token."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import MAX_FIELDS, Field

# Elements a program copies: enough loads in flight, and a decoded token still spreads over ten programs.
_ELEMENTS = 4096


def copy_rows(
    fields: Sequence[Field],
    rows: Tensor,
    cells: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    unpack: bool,
) -> None:
    """Fields into cells, or with `unpack` cells into fields. Arguments as in `pack_rows`, checked there."""
    cell = keys.shape[1]
    block = triton.next_power_of_2(cell)
    num_cells = max(1, _ELEMENTS // block)
    pointers: list[Tensor] = []
    numbers: list[int] = []
    end = 0
    for value, first_cell in fields:
        end += triton.cdiv(value.shape[1], num_cells * cell)
        pointers.append(value)
        numbers += [value.stride(0), value.shape[1], first_cell, end]
    # Fields that are not there: no program is theirs.
    pointers += pointers[:1] * (MAX_FIELDS - len(fields))
    numbers += [0, 0, 0, end] * (MAX_FIELDS - len(fields))
    _copy_kernel[(rows.shape[0], end)](
        *pointers,
        *numbers,
        rows,
        cells,
        keys,
        values,
        cells.shape[1],
        CELL=cell,
        BLOCK=block,
        CELLS=num_cells,
        UNPACK=unpack,
        num_warps=4,
    )


@triton.jit
def _copy_kernel(
    field0,
    field1,
    field2,
    field3,
    field4,
    field5,
    stride0,
    width0,
    first0,
    end0,
    stride1,
    width1,
    first1,
    end1,
    stride2,
    width2,
    first2,
    end2,
    stride3,
    width3,
    first3,
    end3,
    stride4,
    width4,
    first4,
    end4,
    stride5,
    width5,
    first5,
    end5,
    rows,
    cells,
    keys,
    values,
    half,
    CELL: tl.constexpr,
    BLOCK: tl.constexpr,
    CELLS: tl.constexpr,
    UNPACK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.load(rows + token)
    # The field this program works on: the last one that the fields before it leave room for.
    field, stride, width, first, begin = field0, stride0, width0, first0, 0
    field, stride, width, first, begin = _at_or_after(
        chunk, end0, field, stride, width, first, begin, field1, stride1, width1, first1
    )
    field, stride, width, first, begin = _at_or_after(
        chunk, end1, field, stride, width, first, begin, field2, stride2, width2, first2
    )
    field, stride, width, first, begin = _at_or_after(
        chunk, end2, field, stride, width, first, begin, field3, stride3, width3, first3
    )
    field, stride, width, first, begin = _at_or_after(
        chunk, end3, field, stride, width, first, begin, field4, stride4, width4, first4
    )
    field, stride, width, first, begin = _at_or_after(
        chunk, end4, field, stride, width, first, begin, field5, stride5, width5, first5
    )
    if row >= 0:
        number = (chunk - begin) * CELLS + tl.arange(0, CELLS)
        lane = tl.arange(0, BLOCK)
        column = number[:, None] * CELL + lane[None, :]
        ok = (lane < CELL)[None, :] & (column < width)
        place = first + number
        in_values = place >= half
        index = tl.where(in_values, place - half, place)
        slot = tl.load(cells + row * half + index, mask=number * CELL < width, other=0)
        at = slot[:, None] * CELL + lane[None, :]
        mine = field + token * stride + column
        to_keys, to_values = ok & (place < half)[:, None], ok & in_values[:, None]
        if UNPACK:
            from_keys = tl.load(keys + at, mask=to_keys)
            from_values = tl.load(values + at, mask=to_values)
            tl.store(mine, tl.where(in_values[:, None], from_values, from_keys), mask=ok)
        else:
            found = tl.load(mine, mask=ok)
            tl.store(keys + at, found, mask=to_keys)
            tl.store(values + at, found, mask=to_values)


@triton.jit
def _at_or_after(
    chunk, end, field, stride, width, first, begin, field_b, stride_b, width_b, first_b
):
    """The second field from `end` on, the first before."""
    is_later = chunk >= end
    return (
        tl.where(is_later, field_b, field),
        tl.where(is_later, stride_b, stride),
        tl.where(is_later, width_b, width),
        tl.where(is_later, first_b, first),
        tl.where(is_later, end, begin),
    )
