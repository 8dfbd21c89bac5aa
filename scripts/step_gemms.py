"""The matrix products of one replayed backward pass, and nothing else: what the engine's backward is measured against.

Shapes are those of a step in which every completion has its own prompt: per layer the input gradients of the four
fused linears, the five products of attention's backward by tile of queries, and the five thin products of each adapter.
In the last layer only the response's tokens go past the keys and values; the first layer's input needs no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from step_workload import WorkloadConfig

from alchemist.kernels.path_attention.cpu import TILE

Product = Callable[[], object]


def backward_products(config: WorkloadConfig) -> list[Product]:
    """Functions that do one product each; together, one backward pass."""
    tokens = config.batch * (config.prompt + config.response - 1)
    heads = config.batch * config.response
    products: list[Product] = []
    for layer in range(config.num_layers):
        is_last = layer == config.num_layers - 1
        products += _linears(config, tokens, heads if is_last else tokens, is_first=layer == 0)
        queries = config.response if is_last else config.prompt + config.response - 1
        for _ in range(config.batch):
            products += _attention(config, queries)
    return products


def _linears(
    config: WorkloadConfig, tokens: int, queries: int, *, is_first: bool
) -> Iterator[Product]:
    head_dim = config.hidden_size // config.num_heads
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    # (tokens, inputs, outputs of each adapter, whether the input has a gradient)
    for count, fan_in, outputs, has_dx in (
        (queries, hidden, [q], not is_first),
        (tokens, hidden, [kv, kv], not is_first),
        (queries, q, [hidden], True),
        (queries, hidden, [inner, inner], True),
        (queries, inner, [hidden], True),
    ):
        x, a = torch.randn(count, fan_in), torch.randn(config.rank * len(outputs), fan_in)
        d_xa = torch.randn(count, config.rank * len(outputs))
        weight, dy = torch.randn(sum(outputs), fan_in), torch.randn(count, sum(outputs))
        if has_dx:
            yield lambda dy=dy, weight=weight: dy @ weight
            yield lambda d_xa=d_xa, a=a: d_xa @ a
        yield lambda x=x, a=a: x @ a.T
        yield lambda d_xa=d_xa, x=x: d_xa.T @ x
        start = 0
        for width in outputs:
            part, b = dy[:, start : start + width], torch.randn(width, config.rank)
            yield lambda part=part, b=b: part @ b
            yield lambda part=part, d_xa=d_xa: d_xa[:, : config.rank].T @ part
            start += width


def _attention(config: WorkloadConfig, queries: int) -> Iterator[Product]:
    """One sequence's last `queries` tokens against all before them."""
    length = config.prompt + config.response - 1
    head_dim = config.hidden_size // config.num_heads
    groups = config.num_heads // config.num_kv_heads
    for end in range(length - queries, length, TILE):
        count = min(TILE, length - end)
        keys = end + count
        q = torch.randn(config.num_kv_heads, groups * count, head_dim)
        k = torch.randn(config.num_kv_heads, keys, head_dim)
        p = torch.randn(config.num_kv_heads, groups * count, keys)
        # Scores and d p; d q; d k and d v.
        yield lambda q=q, k=k: q @ k.transpose(1, 2)
        yield lambda q=q, k=k: q @ k.transpose(1, 2)
        yield lambda p=p, k=k: p @ k
        yield lambda p=p, q=q: p.transpose(1, 2) @ q
        yield lambda p=p, q=q: p.transpose(1, 2) @ q
