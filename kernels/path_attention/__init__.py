"""Attention over the paths of a token tree: each query sees the keys from the root down to itself.

A `PathBlock` is a set of queries on one path: `keys` are the path's rows by depth, and a query at
depth p sees keys[0..p]. Keys of a shared prefix are stored once; the gradients of all its readers
add up in place.

The backward recomputes the probabilities from q and k, one tile of queries at a time, with the row
maximum and sum of the whole row at hand: it needs neither the output nor the log-sum-exp of the
forward. Measured against torch's CPU flash backward, which needs both: 3–4x faster at 1k tokens.
Grouped heads share a matrix product; keys are never repeated.

On a GPU (`triton.py`) a flash forward gives output and log-sum-exp, and a flash backward works from
(q, k, v, output, log-sum-exp). With a recorded output, the log-sum-exp is recomputed from q and k
alone: half a forward. SGLang's attention backends have it, where they do, inside one call, and do
not hand it out with our models. Gradients of k and v are summed by the program that owns the key
tile, in a fixed order, without atomics (`packing.py`).

What else there is, and why not:
 * `aten._flash_attention_backward`: varlen and grouped heads, but every branch needs its own copy of
   the shared prefix's keys, and the copies' gradients a scatter-add.
 * FlexAttention: masks of any kind over one shared key tensor, but compiled per shape class, with
   block masks that are built for each batch.
 * FlashInfer's paged prefill (`flashinfer.py`): forward only. `paged.py` takes it for the keys that are in a KV pool,
   where they lie, and the Triton forward for the rest. Off in the trainer (`replay.ATTEND_IN_POOL`) until it has
   been measured; on Hopper FlashInfer has kernels of its own.
Not run on a GPU yet. To be measured there: both directions against `_flash_attention_backward` on
unshared sequences, tile sizes and stages, one kernel with float32 atomics on dq against the two,
FlashInfer over the pool against copies and the Triton forward, FlexAttention.

Shapes: Q query rows, S key rows, N heads, K key/value heads, G = N/K, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alchemist.kernels.dispatch import uses_triton

# Queries per tile: the score matrix of a tile stays near a core's cache, and the causal corner is small.
TILE = 64


class PathBlock(NamedTuple):
    """Queries of one path. All int64 on the tensors' device; `queries` and `keys` are row indices."""

    queries: Tensor
    """[m] rows of q, by ascending depth."""
    depths: Tensor
    """[m] position of each query on the path, on the CPU."""
    keys: Tensor
    """[max depth + 1] rows of k and v, by depth, each once."""


def path_attention(
    q_QND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    plan: list[PathBlock],
    recorded: Tensor | None = None,
) -> Tensor:
    """[Q, N, D] attention outputs, scale 1/sqrt(D). Every row of q is in exactly one block.

    Args:
        recorded: the output's value; then the forward does nothing. On a GPU the backward reads it.

    Raises:
        ValueError: on a GPU, if the blocks' paths are not those of one tree.
    """
    y: Tensor = _PathAttention.apply(q_QND, k_SKD, v_SKD, plan, recorded)
    return y


class _Tile(NamedTuple):
    rows: Tensor | slice
    q: Tensor  # [K, G*m, D], scaled
    num_keys: int
    mask: Tensor | None  # [m, num_keys - first], True: hidden
    first: int  # the first key that some query of the tile may not see


def _as_slice(index: Tensor) -> Tensor | slice:
    """A slice when the rows are consecutive: views instead of gathers."""
    n = index.numel()
    first = int(index[0])
    if int(index[-1]) - first == n - 1 and (n < 3 or bool((index[1:] - index[:-1] == 1).all())):
        return slice(first, first + n)
    return index


def _group(x: Tensor, num_kv_heads: int) -> Tensor:
    """[m, N, D] → [K, G*m, D]: the queries of a group of heads in one matrix."""
    m, n, d = x.shape
    grouped = x.view(m, num_kv_heads, n // num_kv_heads, d).permute(1, 2, 0, 3)
    return grouped.reshape(num_kv_heads, -1, d)


def _ungroup(x: Tensor, m: int) -> Tensor:
    """[K, G*m, D] → [m, N, D]."""
    k, gm, d = x.shape
    return x.view(k, gm // m, m, d).permute(2, 0, 1, 3).reshape(m, k * (gm // m), d)


def _tiles(q: Tensor, block: PathBlock, num_kv_heads: int) -> Iterator[_Tile]:
    scale = 1 / math.sqrt(q.shape[-1])
    for queries, depths in zip(block.queries.split(TILE), block.depths.split(TILE), strict=True):
        rows = _as_slice(queries)
        first, num_keys = int(depths[0]) + 1, int(depths[-1]) + 1
        mask = None
        if first < num_keys:
            mask = (torch.arange(first, num_keys) > depths[:, None]).to(q.device)
        yield _Tile(rows, _group(q[rows], num_kv_heads) * scale, num_keys, mask, first)


def _probabilities(tile: _Tile, k_KDS: Tensor) -> Tensor:
    scores = torch.bmm(tile.q, k_KDS[:, :, : tile.num_keys])
    if tile.mask is not None:
        m = tile.mask.shape[0]
        corner = scores.view(scores.shape[0], -1, m, tile.num_keys)[..., tile.first :]
        corner.masked_fill_(tile.mask, -math.inf)
    return torch.softmax(scores, dim=-1)


class _PathAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: list[PathBlock],
        recorded: Tensor | None,
    ) -> Tensor:
        ctx.plan = plan
        if uses_triton(q):
            return _forward_on_gpu(ctx, q, k, v, plan, recorded)
        ctx.save_for_backward(q, k, v)
        if recorded is not None:
            return recorded.detach()
        out = torch.empty_like(q)
        for block in plan:
            keys = _as_slice(block.keys)
            k_KDS = k[keys].permute(1, 2, 0)
            v_KSD = v[keys].transpose(0, 1)
            for tile in _tiles(q, block, k.shape[1]):
                p = _probabilities(tile, k_KDS)
                y = torch.bmm(p, v_KSD[:, : tile.num_keys])
                out[tile.rows] = _ungroup(y, y.shape[1] * k.shape[1] // q.shape[1])
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        if uses_triton(d_out):
            return (*_backward_on_gpu(ctx, d_out), None, None)
        q, k, v = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in ctx.plan:
            keys = _as_slice(block.keys)
            k_KSD = k[keys].transpose(0, 1).contiguous()
            v_KSD = v[keys].transpose(0, 1).contiguous()
            dk_KSD, dv_KSD = torch.zeros_like(k_KSD), torch.zeros_like(v_KSD)
            for tile in _tiles(q, block, k.shape[1]):
                n = tile.num_keys
                p = _probabilities(tile, k_KSD.transpose(1, 2))
                d_o = _group(d_out[tile.rows], k.shape[1])
                dp = torch.bmm(d_o, v_KSD[:, :n].transpose(1, 2))
                dv_KSD[:, :n].baddbmm_(p.transpose(1, 2), d_o)
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                dk_KSD[:, :n].baddbmm_(ds.transpose(1, 2), tile.q)
                d_q = torch.bmm(ds, k_KSD[:, :n]).mul_(scale)
                dq[tile.rows] = _ungroup(d_q, d_q.shape[1] * k.shape[1] // q.shape[1])
            # A path holds each row once, so this is a plain scatter-add.
            dk[keys] += dk_KSD.transpose(0, 1)
            dv[keys] += dv_KSD.transpose(0, 1)
        return dq, dk, dv, None, None


def _forward_on_gpu(
    ctx: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[PathBlock],
    recorded: Tensor | None,
) -> Tensor:
    if recorded is not None:
        ctx.save_for_backward(q, k, v, recorded, None)
        return recorded.detach()
    from . import triton

    out, lse = triton.forward(q, k, v, plan)
    assert out is not None
    ctx.save_for_backward(q, k, v, out, lse)
    return out


def _backward_on_gpu(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton

    q, k, v, out, lse = ctx.saved_tensors
    if lse is None:
        _, lse = triton.forward(q, k, v, ctx.plan, with_output=False)
    return triton.backward(q, k, v, out, lse, d_out, ctx.plan)
