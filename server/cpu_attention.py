"""Attention on a machine without a GPU at a price small models can pay: SGLang's `torch_native` backend, lightened.

For every request in every layer it finds lengths and slots out of tensors of one element, and a prompt that goes on
from a cached prefix it computes as long as both, with queries for the prefix that nobody asked for. Here lengths and
slots are found once for each forward, keys and values of all requests are gathered by one call, and only the queries
that there are get an answer.

Of torch's fused attention on a CPU short prompts in float32 do not have much either: it divides them into tasks as it
does long ones. So up to `BLOCKS_UP_TO` keys the scores of `BLOCK` queries at a time are written out, all heads at once,
and what lies in the future of all of them is never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 128
BLOCKS_UP_TO = 1024
"""Both measured with two threads, heads of 64 and 128, 2 to 12 of keys: `docs/log.md`."""


class CpuAttention:
    """Of one scheduler process: the lengths and slots of the forward that is being computed."""

    def __init__(self) -> None:
        self._backend: Any = None
        """SGLang's, whose forward has `_lengths` and `_slots`; None: they are still to be found."""
        self._lengths: list[int] = []
        """Tokens of each request, cached ones included."""
        self._slots = torch.empty(0)
        """[sum of lengths], one request after the other."""

    def begin(self, result: None, backend: Any, forward_batch: Any) -> None:
        """AFTER `init_forward_metadata`: another forward begins."""
        self._backend = None

    def extend(
        self,
        original: Any,
        backend: Any,
        query: Tensor,
        output: Tensor,
        *given: Any,
        **options: Any,
    ) -> Tensor:
        """AROUND `_run_sdpa_forward_extend`: the new tokens of prompts. Arguments and result are SGLang's.

        Args:
            query: [new tokens, H, D], all requests'.
            output: the same with the values' width; written and returned.
            given: what `_read` takes but for the backend; cached and new tokens of each request; encoders' lengths.
        """
        if not options["causal"] or _is_special(backend, query, given[0], options):
            result: Tensor = original(backend, query, output, *given, **options)
            return result
        keys, values = self._read(backend, *given[:5])
        counts = given[6].tolist()
        parts = zip(query.split(counts), output.split(counts), keys, values, strict=True)
        for q, out, k, v in parts:
            attend(q, k, v, options["scaling"], out)
        return output

    def decode(
        self,
        original: Any,
        backend: Any,
        query: Tensor,
        output: Tensor,
        *given: Any,
        **options: Any,
    ) -> Tensor:
        """AROUND `_run_sdpa_forward_decode`: one token of each request; otherwise as `extend`."""
        if _is_special(backend, query, given[0], options):
            result: Tensor = original(backend, query, output, *given, **options)
            return result
        keys, values = self._read(backend, *given[:5])
        scale = options["scaling"]
        answers = [
            scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)[:, :, 0]
            for q, k, v in zip(query[:, None, :, None].unbind(), keys, values, strict=True)
        ]
        return torch.cat(answers, out=output)

    def _read(
        self,
        backend: Any,
        key_cache: Tensor,
        value_cache: Tensor,
        req_to_token: Tensor,
        requests: Tensor,
        lengths: Tensor,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values of each request: [1, K, N, D].

        Args:
            key_cache: [slots, K, D].
            req_to_token: [requests there can be, tokens of each]: slots.
            requests: rows of it.
            lengths: of each request, cached tokens included.
        """
        if self._backend is not backend:
            self._lengths = lengths.tolist()
            rows = zip(requests.tolist(), self._lengths, strict=True)
            self._slots = torch.cat([req_to_token[row, :length] for row, length in rows])
            self._backend = backend
        keys, values = (
            cache.index_select(0, self._slots).transpose(0, 1)[None].split(self._lengths, dim=2)
            for cache in (key_cache, value_cache)
        )
        return keys, values


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float | None, out: Tensor) -> None:
    """Causal attention of the last E of N tokens of one request.

    Args:
        query: [E, H, D].
        keys: [1, K, N, D]; K divides H.
        values: [1, K, N, V].
        scale: of the scores; None: one by the root of D.
        out: [E, H, V], written.
    """
    new, total = query.shape[0], keys.shape[2]
    if query.dtype == torch.float32 and total <= BLOCKS_UP_TO:
        _attend_in_blocks(query, keys[0], values[0], scale, out)
        return
    mask = None
    if new < total:
        mask = torch.ones(new, total, dtype=torch.bool).tril_(total - new)
    answer = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=mask,
        # Of a mask and this only one may be given; without a prefix they say the same.
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    out.copy_(answer[0].transpose(0, 1))


def _attend_in_blocks(
    query: Tensor, keys: Tensor, values: Tensor, scale: float | None, out: Tensor
) -> None:
    """As `attend`, of keys [K, N, D] and values [K, N, V]."""
    new, num_heads, width = query.shape
    num_groups, total, _ = keys.shape
    shape = new, num_groups, num_heads // num_groups, -1
    # Heads that share keys are rows of one product.
    grouped = (query * (scale or width**-0.5)).view(shape).permute(1, 2, 0, 3)
    answers = out.view(shape).permute(1, 2, 0, 3)
    turned = keys.transpose(1, 2)
    future = query.new_full((BLOCK, BLOCK), -torch.inf).triu_(1)
    # One piece of memory for the scores of all blocks: from the second one on it is in the cores' caches.
    memory = query.new_empty(num_heads * min(BLOCK, new) * total)
    for start in range(0, new, BLOCK):
        q = grouped[:, :, start : start + BLOCK]
        rows = q.shape[2]
        seen = total - new + start
        end = seen + rows
        scores = memory[: num_heads * rows * end].view(num_groups, -1, end)
        torch.bmm(q.reshape(num_groups, -1, width), turned[:, :, :end], out=scores)
        scores.view(*q.shape[:3], end)[..., seen:].add_(future[:rows, :rows])
        torch.softmax(scores, -1, out=scores)
        answer = torch.bmm(scores, values[:, :end])
        answers[:, :, start : start + BLOCK] = answer.view(*q.shape[:3], -1)


def _is_special(backend: Any, query: Tensor, cache: Tensor, options: dict[str, Any]) -> bool:
    """Whether this is what only SGLang's way knows: encoders, sliding windows, a cache of another dtype."""
    return (
        options["is_cross_attn"]
        or options["sliding_window_size"] is not None
        or backend.use_sliding_window_kv_pool
        or query.dtype != cache.dtype
    )
