"""Path attention that reads recorded keys and values where they lie: in the slots of a KV pool. Forward only.

What a query sees is in two sets: keys in the pool, and keys that are *given* as a tensor (computed now, or copied from
the host). Each set is attended to by itself, which gives an output and a log-sum-exp; by the latter the two outputs are
put together. That is exact, however the keys are divided.

Of the pool there is no mask: a run of neighbouring queries of a path with the same pool keys before them sees all of
those, so it is one request, whose table of pages (of one slot each) are their slots by depth. A recorded prompt and its
computed answer make one request; every recorded token between two missing ones begins another. Given keys keep the
causal order of the path without the pool's: they make a plan as `path_attention` takes it, over a tree again.

The pool is lent and may be overwritten while it is read. Nothing here finds that out: whoever calls compares the rows'
generations after what was enqueued has run.

Who computes is left open (`Kernels`): on a GPU FlashInfer for the pool and Triton for the rest; in tests the reference
for both. Not run on a GPU yet. What it saves is a copy of the recorded keys and values a layer, 33 MB read and written
for 4k tokens of an 8B model; what it costs is one more pass over outputs, 100 MB for as many queries. So it pays where
FlashInfer's kernel is the faster one.

Shapes: Q query rows, S key rows, P slots, N heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from alchemist.kernels.dispatch import uses_triton

from . import PathBlock, as_slice

MOST_TABLE = 4
"""Entries of all requests' tables for each key of all paths. With more, missing and recorded tokens alternate so often
that most requests have a query or two and read the pool again and again. Not tuned.
"""


class PagedPlan(NamedTuple):
    """A plan, divided. Requests are in the order of their blocks and, within these, of depth."""

    rows: Tensor | slice
    """Rows of q that see something of the pool, by request; a tensor is int64 on the plan's device."""
    num_queries: list[int]
    """Of each request; together as many as `rows`."""
    num_slots: list[int]
    """Of each request, at least 1."""
    slots: Tensor
    """int32 on the CPU: the requests' tables, one after the other."""
    given: list[PathBlock]
    """Every query, over the given keys on its path."""


class Kernels(NamedTuple):
    """Both give outputs [n, N, D] in q's dtype and the log-sum-exp of the scaled scores [n, N], natural."""

    over_pool: Callable[[Tensor, Tensor, Tensor, PagedPlan], tuple[Tensor, Tensor]]
    """(q of the plan's `rows`, pool keys [P, K, D], pool values, plan)"""
    over_given: Callable[[Tensor, Tensor, Tensor, list[PathBlock]], tuple[Tensor, Tensor]]
    """(q, given keys, given values, plan's `given`)"""


def kernels(dtype: torch.dtype, k_pool: Tensor, v_pool: Tensor) -> Kernels | None:
    """FlashInfer and Triton for queries of `dtype`; None where they cannot read this pool: keys and values then have to
    be copied.
    """
    from . import flashinfer

    if not flashinfer.can_read(dtype, k_pool, v_pool):
        return None
    from . import triton

    def over_given(q: Tensor, k: Tensor, v: Tensor, plan: list[PathBlock]) -> tuple[Tensor, Tensor]:
        out, lse = triton.forward(q, k, v, plan)
        assert out is not None
        return out, lse

    return Kernels(flashinfer.over_pool, over_given)


def split(plan: list[PathBlock], slots: Tensor) -> PagedPlan:
    """Divide a plan. Brings its index tensors to the CPU: once a batch, not once a layer.

    Args:
        slots: int64 [S] on the CPU: of each key row of the plan its slot, −1: it is given. Given keys
            lie one after the other in the order of S.

    Raises:
        ValueError: a query's own key is in the pool; what it sees of the given ones may then be nothing.
    """
    given_row = (slots < 0).cumsum(0) - 1
    given: list[PathBlock] = []
    rows, num_queries, num_slots, tables = [], [], [], []
    for block, keys, queries in zip(plan, *_on_cpu(plan), strict=True):
        at = slots[keys]
        is_pooled = at >= 0
        if bool(is_pooled[block.depths].any()):
            raise ValueError("a query's own key is in the pool")
        # Of each query: how many keys in the pool it sees.
        num_seen = is_pooled.cumsum(0)[block.depths]
        own_keys = given_row[keys[~is_pooled]].to(block.keys.device)
        given.append(PathBlock(block.queries, block.depths - num_seen, own_keys))
        table, first = at[is_pooled], 0
        counts, sizes = torch.unique_consecutive(num_seen, return_counts=True)
        for count, size in zip(counts.tolist(), sizes.tolist(), strict=True):
            if count:
                rows.append(queries[first : first + size])
                num_queries.append(size)
                num_slots.append(count)
                tables.append(table[:count])
            first += size
    empty = slots[:0]
    # A slice where it can be: the queries are then neither gathered nor scattered.
    order = as_slice(torch.cat(rows)) if rows else slice(0, 0)
    if isinstance(order, Tensor):
        order = order.to(plan[0].queries.device)
    return PagedPlan(
        order, num_queries, num_slots, torch.cat([empty, *tables]).to(torch.int32), given
    )


def is_worth(paged: PagedPlan, plan: list[PathBlock]) -> bool:
    """Whether `plan` is to be computed as `paged`, what `split` made of it."""
    return 0 < paged.slots.numel() <= MOST_TABLE * sum(block.keys.numel() for block in plan)


def attention(
    q_QND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    k_pool_PKD: Tensor,
    v_pool_PKD: Tensor,
    plan: PagedPlan,
    kernels: Kernels,
) -> Tensor:
    """[Q, N, D] attention outputs as `path_attention` gives them; no gradient.

    Args:
        k_SKD, v_SKD: the given keys and values.
        k_pool_PKD, v_pool_PKD: borrowed; read in the order of the current stream.
    """
    if not plan.given:
        return torch.empty_like(q_QND)
    out, lse = kernels.over_given(q_QND, k_SKD, v_SKD, plan.given)
    if plan.num_queries:
        at = plan.rows
        part, part_lse = out[at], lse[at]
        merge_(part, part_lse, *kernels.over_pool(q_QND[at], k_pool_PKD, v_pool_PKD, plan))
        if not isinstance(at, slice):
            out[at] = part
    return out


def merge_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Attention over two sets of keys from that over each, into `out`. Computes in float32 (float64: in that), rounds
    once.

    Args:
        out, other: [n, N, D] outputs over the one set and over the other, contiguous.
        lse, other_lse: [n, N] log-sum-exp of their scores, natural. `lse` is finite.
    """
    if uses_triton(out):
        from . import triton

        triton.merge_(out, lse, other, other_lse)
        return
    wide = torch.promote_types(out.dtype, torch.float32)
    # e^other / (e^own + e^other), with no power that can overflow.
    share = torch.sigmoid(other_lse - lse).to(wide)[..., None]
    out.copy_(torch.lerp(out.to(wide), other.to(wide), share))


def _on_cpu(plan: list[PathBlock]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and queries of each block, in one copy each."""
    if not plan:
        return [], []
    keys = torch.cat([block.keys for block in plan]).cpu()
    queries = torch.cat([block.queries for block in plan]).cpu()
    return (
        list(keys.split([block.keys.numel() for block in plan])),
        list(queries.split([block.queries.numel() for block in plan])),
    )
