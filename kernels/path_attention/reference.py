"""Plain torch: every query by itself, for autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import PathBlock
from .paged import PagedPlan


def path_attention(q_QND: Tensor, k_SKD: Tensor, v_SKD: Tensor, plan: list[PathBlock]) -> Tensor:
    return path_attention_and_lse(q_QND, k_SKD, v_SKD, plan)[0]


def path_attention_and_lse(
    q_QND: Tensor, k_SKD: Tensor, v_SKD: Tensor, plan: list[PathBlock]
) -> tuple[Tensor, Tensor]:
    """(outputs [Q, N, D], natural log-sum-exp of the scaled scores [Q, N])"""
    rows: dict[int, tuple[Tensor, Tensor]] = {}
    for block in plan:
        for query, depth in zip(block.queries.tolist(), block.depths.tolist(), strict=True):
            rows[query] = _attend(q_QND[query], k_SKD, v_SKD, block.keys[: depth + 1])
    outs, lses = zip(*(rows[i] for i in range(q_QND.shape[0])), strict=True)
    return torch.stack(outs), torch.stack(lses)


def over_pool(
    q_nND: Tensor, k_PKD: Tensor, v_PKD: Tensor, plan: PagedPlan
) -> tuple[Tensor, Tensor]:
    """The same of `plan.rows`' queries over its requests' slots."""
    tables = plan.slots.to(q_nND.device, torch.int64).split(plan.num_slots)
    found = [
        _attend(query, k_PKD, v_PKD, table)
        for queries, table in zip(q_nND.split(plan.num_queries), tables, strict=True)
        for query in queries
    ]
    outs, lses = zip(*found, strict=True)
    return torch.stack(outs), torch.stack(lses)


def _attend(q_ND: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    groups = q_ND.shape[0] // k.shape[1]
    keys = k[rows].repeat_interleave(groups, dim=1)
    values = v[rows].repeat_interleave(groups, dim=1)
    scores = torch.einsum("nd,snd->ns", q_ND, keys) / math.sqrt(q_ND.shape[-1])
    return torch.einsum("ns,snd->nd", scores.softmax(-1), values), scores.logsumexp(-1)
