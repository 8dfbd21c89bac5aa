"""Path attention in plain torch: one tile of queries at a time, against all keys of its path.

A path's keys and values are gathered into [K, S, D] buffers, which the paths of a plan take in turn. What a path shares
with the one before is there already, and so are the gradients: a prefix of many paths that follow each other, as a
tree's do, is gathered once and scattered once.

Grouped heads share a matrix product; keys are never repeated. Shapes as in the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import PathBlock, as_slice
from .kept import Kept

TILE = 64
"""Queries per tile: the score matrix of a tile stays near a core's cache, and the causal corner is small."""
ALIGNED = 16
"""Columns of scores are a multiple of it, the last ones hidden: rows of odd length make a product a tenth slower."""


class Tile(NamedTuple):
    """Queries of a path that lie next to each other on it."""

    rows: Tensor | slice
    num_keys: int
    """Of the buffer: at least as many as some query sees."""
    first: int
    """The first key that some query does not see."""
    hidden: Tensor
    """[m, num_keys - first], added to the scores: 0, or −inf where a query does not see a key."""


class Path(NamedTuple):
    keys: Tensor | slice
    """Rows of k and v, by depth."""
    length: int
    shared: int
    """How many of its first keys are also the path's before it."""
    tiles: list[Tile]

    def own(self, shared: int) -> Tensor | slice:
        """`keys` from depth `shared` on."""
        if isinstance(self.keys, slice):
            return slice(self.keys.start + shared, self.keys.stop)
        return self.keys[shared:]


_prepared = Kept[list[Path]]()


def prepared(plan: list[PathBlock]) -> list[Path]:
    """The plan's paths and tiles."""

    def make() -> list[Path]:
        return [_path(block, before) for block, before in zip(plan, [None, *plan], strict=False)]

    return _prepared.of(plan, TILE, make)


def _path(block: PathBlock, before: PathBlock | None) -> Path:
    shared = 0
    if before is not None:
        most = min(block.keys.numel(), before.keys.numel())
        shared = int((block.keys[:most] == before.keys[:most]).cumprod(0).sum())
    tiles = []
    for queries, depths in zip(block.queries.split(TILE), block.depths.split(TILE), strict=True):
        first, num_keys = int(depths[0]) + 1, aligned(int(depths[-1]) + 1)
        is_hidden = torch.arange(first, num_keys) > depths[:, None]
        hidden = (
            torch.zeros(is_hidden.shape).masked_fill_(is_hidden, -math.inf).to(block.queries.device)
        )
        tiles.append(Tile(as_slice(queries), num_keys, first, hidden))
    return Path(as_slice(block.keys), block.keys.numel(), shared, tiles)


def aligned(length: int) -> int:
    """Columns of the scores of a tile whose last query sees `length` keys."""
    return -(-length // ALIGNED) * ALIGNED


def _gathered(x_SKD: Tensor, paths: list[Path]) -> Iterator[Tensor]:
    """The rows of one path after the other, [K, S, D]: its own where it has some, anything finite beyond."""
    buffer = _buffer(x_SKD, paths)
    for path in paths:
        own = x_SKD[path.own(path.shared)]
        buffer[:, path.shared : path.length] = own.transpose(0, 1)
        yield buffer


def _buffer(x_SKD: Tensor, paths: list[Path]) -> Tensor:
    length = aligned(max((path.length for path in paths), default=0))
    return x_SKD.new_zeros(x_SKD.shape[1], length, x_SKD.shape[2])


def _scatter(d_KSD: Tensor, path: Path, shared: int, d_SKD: Tensor) -> None:
    """Add what a path's keys have got from depth `shared` on to `d_SKD`, and begin anew there."""
    own = d_KSD[:, shared : path.length]
    # A path holds each row once, so this is a plain scatter-add.
    d_SKD[path.own(shared)] += own.transpose(0, 1)
    own.zero_()


def _group(x: Tensor, rows: Tensor | slice, num_kv_heads: int) -> Tensor:
    """Rows of [Q, N, D] → [K, G*m, D]: the queries of a group of heads in one matrix."""
    grouped = x[rows].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    return grouped.reshape(num_kv_heads, -1, x.shape[-1])


def _ungroup(grouped: Tensor, out: Tensor, rows: Tensor | slice) -> None:
    """[K, G*m, D] → rows of `out` [Q, N, D]."""
    kv_heads, dim = grouped.shape[0], grouped.shape[2]
    groups = out.shape[1] // kv_heads
    apart = grouped.view(kv_heads, groups, -1, dim).permute(2, 0, 1, 3)
    out.unflatten(1, (kv_heads, groups))[rows] = apart


def _probabilities(tile: Tile, q_KMD: Tensor, k_KSD: Tensor) -> Tensor:
    scores = torch.bmm(q_KMD, k_KSD[:, : tile.num_keys].transpose(1, 2))
    corner = scores.view(scores.shape[0], -1, *tile.hidden.shape[:1], tile.num_keys)
    corner[..., tile.first :].add_(tile.hidden)
    return torch.softmax(scores, dim=-1)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: list[PathBlock]) -> Tensor:
    """[Q, N, D]"""
    out, kv_heads = torch.empty_like(q), k.shape[1]
    q = q / math.sqrt(q.shape[-1])
    paths = prepared(plan)
    for path, k_KSD, v_KSD in zip(paths, _gathered(k, paths), _gathered(v, paths), strict=True):
        for tile in path.tiles:
            p = _probabilities(tile, _group(q, tile.rows, kv_heads), k_KSD)
            _ungroup(torch.bmm(p, v_KSD[:, : tile.num_keys]), out, tile.rows)
    return out


def backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, plan: list[PathBlock]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Recomputes the probabilities from q and k, with the row maximum and sum of the whole row at hand: it needs neither
    the output nor the log-sum-exp of the forward. Measured against torch's CPU flash backward, which needs both: 3–4x
    faster at 1k tokens.
    """
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    kv_heads, root = k.shape[1], math.sqrt(q.shape[-1])
    q = q / root
    paths = prepared(plan)
    dk_KSD, dv_KSD = _buffer(k, paths), _buffer(v, paths)
    before: Path | None = None
    for path, k_KSD, v_KSD in zip(paths, _gathered(k, paths), _gathered(v, paths), strict=True):
        if before is not None:
            _scatter(dk_KSD, before, path.shared, dk)
            _scatter(dv_KSD, before, path.shared, dv)
        before = path
        for tile in path.tiles:
            n = tile.num_keys
            q_KMD = _group(q, tile.rows, kv_heads)
            p = _probabilities(tile, q_KMD, k_KSD)
            d_o = _group(d_out, tile.rows, kv_heads)
            dp = torch.bmm(d_o, v_KSD[:, :n].transpose(1, 2))
            dv_KSD[:, :n].baddbmm_(p.transpose(1, 2), d_o)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dk_KSD[:, :n].baddbmm_(ds.transpose(1, 2), q_KMD)
            _ungroup(torch.bmm(ds, k_KSD[:, :n]), dq, tile.rows)
    if before is not None:
        _scatter(dk_KSD, before, 0, dk)
        _scatter(dv_KSD, before, 0, dv)
    return dq.div_(root), dk, dv
