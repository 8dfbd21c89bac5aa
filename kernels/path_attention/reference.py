"""Plain torch: every query by itself, for autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import PathBlock


def path_attention(q_QND: Tensor, k_SKD: Tensor, v_SKD: Tensor, plan: list[PathBlock]) -> Tensor:
    groups = q_QND.shape[1] // k_SKD.shape[1]
    rows: dict[int, Tensor] = {}
    for block in plan:
        for query, depth in zip(block.queries.tolist(), block.depths.tolist(), strict=True):
            keys = block.keys[: depth + 1]
            k = k_SKD[keys].repeat_interleave(groups, dim=1)
            v = v_SKD[keys].repeat_interleave(groups, dim=1)
            scores = torch.einsum("nd,snd->ns", q_QND[query], k) / math.sqrt(q_QND.shape[-1])
            rows[query] = torch.einsum("ns,snd->nd", scores.softmax(-1), v)
    return torch.stack([rows[i] for i in range(q_QND.shape[0])])
