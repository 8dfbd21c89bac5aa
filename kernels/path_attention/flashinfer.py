"""FlashInfer's paged prefill (0.6): forward only, for tokens that are computed without a graph.

`over_pool` is for `paged.py`: requests over the KV pool, whose slots are pages of one token, without a mask. `forward`
is a whole plan over keys that were gathered before, to be timed beside the Triton forward; its causal mask ends where
the keys end: queries at neighbouring depths of a path are one request, whose keys are the path down to the last of
them; a gap begins another request.

On Hopper FlashInfer takes its FA3 kernels, elsewhere FA2's. Its log-sum-exp has base 2. Not run at all yet: argument
lists and meanings are those of the sources of flashinfer 0.6.15.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import PathBlock
from .paged import PagedPlan

HEAD_DIMS = (64, 128, 256)
"""For which both of its kernel families are built."""


def is_available() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def can_read(dtype: torch.dtype, k_pool: Tensor, v_pool: Tensor) -> bool:
    """Whether queries of `dtype` can attend to a pool [P, K, D]. A pool of another dtype, so of eight bits, is left to
    those who copy and convert.
    """
    return (
        k_pool.is_cuda
        and dtype in (torch.bfloat16, torch.float16)
        and k_pool.dtype == v_pool.dtype == dtype
        and k_pool.shape[-1] in HEAD_DIMS
        and k_pool.stride() == v_pool.stride()
        and k_pool.stride(-1) == 1
        and is_available()
    )


def over_pool(q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: PagedPlan) -> tuple[Tensor, Tensor]:
    """(outputs [n, N, D], natural log-sum-exp [n, N] float32) of the queries of `plan.rows`. The kernel is enqueued on
    the current stream and reads the pool itself.
    """

    def requests() -> _Requests:
        return _Requests(plan.num_queries, plan.num_slots, plan.slots)

    run = _planned(plan, requests, q, k_pool, causal=False)
    out, lse = run(q.contiguous(), _pages(k_pool, v_pool), return_lse=True)
    return out, lse * math.log(2)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: list[PathBlock]) -> Tensor:
    """[Q, N, D] outputs of 16-bit q, k, v, as `path_attention` gives them; no gradient."""
    run = _planned(plan, lambda: _requests(plan), q, k, causal=True)
    order = torch.cat([block.queries for block in plan])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    out[order] = run(q[order], _pages(k.contiguous(), v.contiguous()))
    return out


class _Requests(NamedTuple):
    """Queries and keys of every request, and all their keys' rows, int on any device."""

    num_queries: list[int]
    num_keys: list[int]
    rows: Tensor


class _Kept(NamedTuple):
    plan: object
    shape: tuple[Any, ...]
    run: Callable[..., Any]
    copied: torch.cuda.Event
    """FlashInfer's schedule has left the pinned memory of the wrapper."""


_KEPT = 2
_kept: list[_Kept] = []
_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def _planned(
    plan: object, requests: Callable[[], _Requests], q: Tensor, k: Tensor, *, causal: bool
) -> Callable[..., Any]:
    """FlashInfer's `run`, kept for the last plans: every layer of a batch asks for the same ones."""
    shape = (q.shape[1:], k.shape[1], q.dtype, k.dtype, q.device, causal)
    for entry in _kept:
        if entry.plan is plan and entry.shape == shape:
            return entry.run
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspace(q, k), "NHD")
    num_queries, num_keys, rows = requests()
    # On the CPU, where FlashInfer makes its schedule: it takes what it needs to the device.
    wrapper.plan(
        _starts(num_queries),
        _starts(num_keys),
        rows.to(torch.int32),
        torch.ones(len(num_keys), dtype=torch.int32),
        q.shape[1],
        k.shape[1],
        q.shape[2],
        1,
        causal=causal,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
        max_token_per_sequence=max(num_queries),
    )
    copied = torch.cuda.Event()
    copied.record()
    _kept.insert(0, _Kept(plan, shape, wrapper.run, copied))
    for entry in _kept[_KEPT:]:
        # Its pinned memory goes back to torch, which does not know of FlashInfer's copy.
        entry.copied.synchronize()
    del _kept[_KEPT:]
    return wrapper.run


def _workspace(q: Tensor, k: Tensor) -> Tensor:
    """Where FA2 leaves the parts of a request that it has divided: at most two blocks a multiprocessor, of 128 rows
    each. FA3 divides none.
    """
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    groups, width = q.shape[1] // k.shape[1], q.shape[2] + 1
    size = 4 * groups * 2 * num_sms * 128 * width
    # Shared by the plans that are kept: they run one after the other.
    if (q.device, size) not in _workspaces:
        _workspaces[q.device, size] = torch.empty(size, dtype=torch.uint8, device=q.device)
    return _workspaces[q.device, size]


def _pages(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[P, K, D] as pages of one token, [P, 1, K, D]."""
    return k.unsqueeze(1), v.unsqueeze(1)


def _requests(plan: list[PathBlock]) -> _Requests:
    num_queries, num_keys, indices = [], [], []
    for block in plan:
        depths = block.depths.numpy()
        for run in np.split(depths, np.flatnonzero(np.diff(depths) != 1) + 1):
            num_queries.append(run.size)
            num_keys.append(int(run[-1]) + 1)
            indices.append(block.keys[: num_keys[-1]])
    return _Requests(num_queries, num_keys, torch.cat(indices))


def _starts(counts: list[int]) -> Tensor:
    """int32 [requests + 1] on the CPU."""
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0))
