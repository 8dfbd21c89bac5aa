"""A plan as the kernels read it: flat index tables, tiles of queries, tiles of keys.

Queries of all blocks lie one after the other, by block and depth; so do the paths' keys. A tile of
queries is part of one block. A tile of keys is part of a *segment*: rows that the same blocks see,
at the same depths. So each row of k is in exactly one tile, and the program that has the tile can
add up the gradients of all its readers by itself: its *spans* are, for each block that sees it, the
queries deep enough.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import PathBlock
from .kept import Kept

Ints = npt.NDArray[np.int64]


class PackedPlan(NamedTuple):
    """All tensors int32 on the keys' device."""

    q_rows: Tensor
    """[Q] row of q of each query."""
    depths: Tensor
    """[Q]"""
    key_rows: Tensor
    """[keys of all paths] row of k and v."""
    q_tiles: Tensor
    """[n, 3] first query, the query after the last, where the path begins in `key_rows`; longest first."""
    k_tiles: Tensor
    """[m, 5] where it begins in `key_rows`, keys, depth of the first, first span, spans; busiest first."""
    spans: Tensor
    """[s, 3] the first query that sees the tile's first key, the first that sees all, the one after the last."""


def pack(plan: list[PathBlock], queries_per_tile: int, keys_per_tile: int) -> PackedPlan:
    """Brings the plan's keys to the host: once a batch, not once a layer (`packed` keeps it).

    Raises:
        ValueError: the blocks' paths are not those of one tree.
    """
    device = plan[0].keys.device
    depths = np.concatenate([block.depths.numpy() for block in plan])
    num_queries = np.array([block.depths.numel() for block in plan])
    q_ends = np.cumsum(num_queries)
    key_rows = torch.cat([block.keys for block in plan])
    lengths = np.array([block.keys.numel() for block in plan])
    q_tiles = _query_tiles(depths, q_ends - num_queries, q_ends, lengths, queries_per_tile)
    k_tiles, spans = _key_tiles(key_rows.cpu().numpy(), lengths, depths, q_ends, keys_per_tile)
    tables = [depths, q_tiles.reshape(-1), k_tiles.reshape(-1), spans.reshape(-1)]
    flat = torch.from_numpy(np.concatenate(tables).astype(np.int32)).to(device)
    parts = flat.split([table.size for table in tables])
    return PackedPlan(
        torch.cat([block.queries for block in plan]).to(torch.int32),
        parts[0],
        key_rows.to(torch.int32),
        parts[1].view(-1, 3),
        parts[2].view(-1, 5),
        parts[3].view(-1, 3),
    )


_packed = Kept[PackedPlan]()


def packed(plan: list[PathBlock], queries_per_tile: int, keys_per_tile: int) -> PackedPlan:
    """`pack`, kept for the last few plans."""
    sizes = queries_per_tile, keys_per_tile
    return _packed.of(plan, sizes, lambda: pack(plan, *sizes))


def _query_tiles(depths: Ints, starts: Ints, ends: Ints, lengths: Ints, size: int) -> Ints:
    key_starts = np.cumsum(lengths) - lengths
    tiles = [
        (first, min(first + size, end), keys)
        for start, end, keys in zip(
            starts.tolist(), ends.tolist(), key_starts.tolist(), strict=True
        )
        for first in range(start, end, size)
    ]
    table = np.array(tiles, dtype=np.int64)
    return table[np.argsort(-depths[table[:, 1] - 1], kind="stable")]


def _key_tiles(
    rows: Ints, lengths: Ints, depths: Ints, q_ends: Ints, size: int
) -> tuple[Ints, Ints]:
    key_starts = np.cumsum(lengths) - lengths
    block_of = np.repeat(np.arange(lengths.size), lengths)
    depth_of = np.arange(rows.size) - key_starts[block_of]
    _, first, row_of, count = np.unique(
        rows, return_index=True, return_inverse=True, return_counts=True
    )
    _check_tree(rows, depth_of, first[row_of])
    # Places in `rows` by row, then block: the blocks that see a row are one run of it.
    by_row = np.argsort(row_of, kind="stable")
    run_of = np.cumsum(count) - count
    # A query's order among all: its block first, then its depth.
    stride = int(lengths.max()) + 1
    q_block = np.repeat(np.arange(lengths.size), np.diff(q_ends, prepend=0))
    q_order = q_block * stride + depths

    tiles: list[tuple[int, int, int, int, int]] = []
    spans: list[Ints] = []
    work: list[int] = []
    num_spans = 0
    # A row belongs to the first block that sees it; what a block owns is the end of its path.
    is_owned = first[row_of] == np.arange(rows.size)
    readers_of = count[row_of]
    for start, length in zip(key_starts, lengths, strict=True):
        own = start + int(np.argmax(is_owned[start : start + length]))
        if not is_owned[own]:
            continue
        numbers = readers_of[own : start + length]
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), numbers.size]
        for low, high in itertools.pairwise(cuts):
            run = run_of[row_of[own + low]]
            readers = block_of[by_row[run : run + numbers[low]]]
            for begin in range(own + low, own + high, size):
                n = min(size, own + high - begin)
                depth = begin - start
                sees_one = np.searchsorted(q_order, readers * stride + depth)
                sees_all = np.searchsorted(q_order, readers * stride + depth + n - 1)
                span = np.stack([sees_one, sees_all, q_ends[readers]], axis=1)
                span = span[span[:, 0] < span[:, 2]]
                tiles.append((begin, n, depth, num_spans, len(span)))
                spans.append(span)
                work.append(int((span[:, 2] - span[:, 0]).sum()))
                num_spans += len(span)
    order = np.argsort(-np.array(work), kind="stable")
    return np.array(tiles, dtype=np.int64)[order], np.concatenate(spans)


def _check_tree(rows: Ints, depth_of: Ints, first: Ints) -> None:
    """Wherever a row is seen again, it has the same depth and the same row before it."""
    before = np.where(depth_of > 0, rows[np.arange(rows.size) - 1], -1)
    wrong = np.flatnonzero((depth_of[first] != depth_of) | (before[first] != before))
    if wrong.size:
        raise ValueError(
            f"the plan is not one of a tree: row {rows[wrong[0]]} is on two different paths"
        )
