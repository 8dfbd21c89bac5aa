"""FlashInfer's paged prefill over the plan's paths: forward only, for tokens that are computed without a graph.

The keys' rows are a paged KV cache with pages of one token, so paths are read by index. Its causal
mask ends where the keys end: queries at neighbouring depths of a path are one request, whose keys
are the path down to the last of them; a gap begins another request.

Nothing calls it yet. It is to be measured against the Triton forward first, on Hopper, where it has
kernels of its own for head dims 64, 128 and 256. Not run at all yet: argument lists are those of
flashinfer 0.6.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import PathBlock

WORKSPACE_BYTES = 128 << 20


def is_available() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def forward(q: Tensor, k: Tensor, v: Tensor, plan: list[PathBlock]) -> Tensor:
    """[Q, N, D] outputs of 16-bit q, k, v, as `path_attention` gives them; no gradient."""
    run, order = _planned(q, k, plan)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    out[order] = run(q[order], (k.contiguous().unsqueeze(1), v.contiguous().unsqueeze(1)))
    return out


_KEPT = 2
_kept: list[tuple[list[PathBlock], tuple[Any, ...], Any, Tensor]] = []
_workspaces: dict[torch.device, Tensor] = {}


def _planned(q: Tensor, k: Tensor, plan: list[PathBlock]) -> tuple[Any, Tensor]:
    """(run, the queries' rows in the order of requests), kept for the last plans."""
    shape = (q.shape[1:], k.shape[1], q.dtype, k.dtype)
    for entry in _kept:
        if entry[0] is plan and entry[1] == shape:
            return entry[2], entry[3]
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    if q.device not in _workspaces:
        _workspaces[q.device] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspaces[q.device], "NHD")
    num_queries, num_keys, indices = _requests(plan)
    device = q.device
    wrapper.plan(
        _starts(num_queries, device),
        _starts(num_keys, device),
        indices.to(torch.int32),
        torch.ones(len(num_keys), dtype=torch.int32, device=device),
        q.shape[1],
        k.shape[1],
        q.shape[2],
        1,
        causal=True,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    order = torch.cat([block.queries for block in plan])
    _kept.insert(0, (plan, shape, wrapper.run, order))
    del _kept[_KEPT:]
    return wrapper.run, order


def _requests(plan: list[PathBlock]) -> tuple[list[int], list[int], Tensor]:
    """Queries and keys of every request, and all their keys' rows."""
    num_queries, num_keys, indices = [], [], []
    for block in plan:
        depths = block.depths.numpy()
        for run in np.split(depths, np.flatnonzero(np.diff(depths) != 1) + 1):
            num_queries.append(run.size)
            num_keys.append(int(run[-1]) + 1)
            indices.append(block.keys[: num_keys[-1]])
    return num_queries, num_keys, torch.cat(indices)


def _starts(counts: list[int], device: torch.device) -> Tensor:
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0)).to(device)
