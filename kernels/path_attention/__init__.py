"""Attention over the paths of a token tree: each query sees the keys from the root down to itself.

A `PathBlock` is a set of queries on one path: `keys` are the path's rows by depth, and a query at
depth p sees keys[0..p]. Keys of a shared prefix are stored once; the gradients of all its readers
add up in place.

On a CPU (`cpu.py`) the backward recomputes the probabilities from q and k; it reads no output.

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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from alchemist.kernels.dispatch import uses_triton


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


def as_slice(index: Tensor) -> Tensor | slice:
    """A slice when the rows are consecutive: views instead of gathers."""
    n = index.numel()
    first = int(index[0])
    if int(index[-1]) - first == n - 1 and (n < 3 or bool((index[1:] - index[:-1] == 1).all())):
        return slice(first, first + n)
    return index


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
        from . import cpu

        return cpu.forward(q, k, v, plan)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        if uses_triton(d_out):
            return (*_backward_on_gpu(ctx, d_out), None, None)
        from . import cpu

        return (*cpu.backward(*ctx.saved_tensors, d_out, ctx.plan), None, None)


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
