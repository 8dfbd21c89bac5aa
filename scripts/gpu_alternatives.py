"""Kernels of others that could do what ours do, timed beside them: FlashInfer over the KV pool, FlexAttention, Liger.

Every one is held to its accuracy first. What is not installed, or needs a GPU, leaves its row empty and says so.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu_part import Part
from gpu_timing import in_turn, ratios
from torch import Tensor

from alchemist.kernels.linear_logprob import linear_logprob, linear_logprob_backward
from alchemist.kernels.path_attention import PathBlock, flashinfer, paged, path_attention, reference
from alchemist.kernels.rms_norm import rms_norm
from alchemist.kernels.swiglu import swiglu

HEADS, KV_HEADS, DIM, HIDDEN, INNER, VOCABULARY = 32, 8, 128, 4096, 12_288, 151_936
"""Qwen3-8B's."""
NEAR = 0.02
"""Norm of the difference ÷ norm, of two roundings to bfloat16: always less."""


class Recorded(NamedTuple):
    """Sequences whose prompts' keys and values are in a pool, and what is computed of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_pool: Tensor
    v_pool: Tensor
    slots: Tensor
    """int64, of the recorded tokens; scattered."""
    plan: list[PathBlock]
    """Rows of keys: the recorded tokens, then those computed."""


def pool_kernels(part: Part, k_pool: Tensor, v_pool: Tensor) -> paged.Kernels:
    """FlashInfer and Triton; in a rehearsal without a GPU the reference, so that the rest is rehearsed."""
    if part.device == "cpu":
        return paged.Kernels(reference.over_pool, reference.path_attention_and_lse)
    if not flashinfer.is_available():
        raise RuntimeError("flashinfer is not installed")
    kernels = paged.kernels(k_pool.dtype, k_pool, v_pool)
    assert kernels is not None
    return kernels


def pool_accuracy(part: Part) -> None:
    """Error of attention that reads the pool, beside PyTorch's, over trees with gaps at scattered slots."""
    from gpu_kernels import ratio
    from kernel_accuracy import Bench, pooled

    dtype = torch.float32 if part.device == "cpu" else torch.bfloat16
    bench = Bench(part.device, dtype, is_small=part.tiny)
    sample = bench.random(1, KV_HEADS, DIM)
    kernels, shape = pool_kernels(part, sample, sample), (HEADS // KV_HEADS, KV_HEADS, DIM)
    found = [pooled(bench, tree, shape, kernels) for tree in ("chain", "branches")]
    worst = {kind: max(ratio(vars(c), kind) for c in found) for kind in ("max", "rms")}
    note = "the reference in its place" if part.device == "cpu" else None
    part.add("attention_pool_max_error", worst["max"], n=len(found), against=note)
    part.add("attention_pool_rms_error", worst["rms"], n=len(found), against=note)


def _recorded(part: Part) -> Recorded:
    """Sequences of 4096 tokens whose last 256 are computed."""
    count, prompt, own = (2, 60, 4) if part.tiny else (8, 3840, 256)
    device = torch.device(part.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def random(n: int, heads: int) -> Tensor:
        return torch.randn(n, heads, DIM, generator=generator, device=device, dtype=dtype)

    num_slots = 2 * count * prompt
    slots = torch.randperm(num_slots, generator=generator, device=device)[: count * prompt]
    plan = []
    for i in range(count):
        queries = torch.arange(i * own, (i + 1) * own)
        recorded = torch.arange(i * prompt, (i + 1) * prompt)
        keys = torch.cat([recorded, count * prompt + queries])
        depths = torch.arange(prompt, prompt + own)
        plan.append(PathBlock(queries.to(device), depths, keys.to(device)))
    return Recorded(
        random(count * own, HEADS),
        random(count * own, KV_HEADS),
        random(count * own, KV_HEADS),
        random(num_slots, KV_HEADS),
        random(num_slots, KV_HEADS),
        slots,
        plan,
    )


def pool_speed(part: Part) -> None:
    """Reading the pool in place against what the trainer does else: it copies keys and values, then attends to them.
    The copy here is the plainest there is.
    """
    at = _recorded(part)
    n, m = at.slots.numel(), at.k.shape[0]
    kernels = pool_kernels(part, at.k_pool, at.v_pool)
    divided = paged.split(at.plan, torch.cat([at.slots.cpu(), torch.full((m,), -1)]))

    def in_place() -> Tensor:
        return paged.attention(at.q, at.k, at.v, at.k_pool, at.v_pool, divided, kernels)

    def copied() -> Tensor:
        keys, values = (at.k.new_empty(n + m, *at.k.shape[1:]) for _ in range(2))
        for out, pool, own in ((keys, at.k_pool, at.k), (values, at.v_pool, at.v)):
            torch.index_select(pool, 0, at.slots, out=out[:n])
            out[n:] = own
        return path_attention(at.q, keys, values, at.plan)

    _compare(part, "attention_pool_vs_copy", f"{n} tokens in slots, {m} computed", copied, in_place)


def flex(part: Part) -> None:
    """FlexAttention, compiled for this shape, on one sequence: its forward, and both directions."""
    if part.device == "cpu":
        raise RuntimeError("FlexAttention is timed on a GPU only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    num_tokens, device = (256 if part.tiny else 4096), torch.device(part.device)
    generator = torch.Generator(device).manual_seed(0)
    leaves = [
        torch.randn(num_tokens, n, DIM, generator=generator, device=device, dtype=torch.bfloat16)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    ]
    tokens = torch.arange(num_tokens)
    plan = [PathBlock(tokens.to(device), tokens, tokens.to(device))]
    mask = create_block_mask(
        lambda b, h, query, key: query >= key, None, None, num_tokens, num_tokens, device=device
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def theirs() -> Tensor:
        heads_first = [t.transpose(0, 1)[None] for t in leaves]
        return compiled(*heads_first, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    def ours() -> Tensor:
        return path_attention(*leaves, plan)

    what = f"{num_tokens} tokens"
    _compare(part, "attention_flex_forward_vs_ours", what, theirs, ours)
    for leaf in leaves:
        leaf.requires_grad_()
    dy = torch.randn_like(leaves[0])
    both = [_with_gradient(function, leaves, dy) for function in (theirs, ours)]
    _compare(part, "attention_flex_both_vs_ours", what, *both)


def liger(part: Part) -> None:
    """Liger's norm, SwiGLU and linear loss, forward and backward."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise RuntimeError("liger_kernel is not installed")
    if part.device == "cpu":
        raise RuntimeError("Liger's kernels need a GPU")
    from liger_kernel.transformers import functional

    num_tokens, device = (64 if part.tiny else 4096), torch.device(part.device)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)
        return x * scale

    x, weight = random(num_tokens, HIDDEN).requires_grad_(), random(HIDDEN)
    dy = random(num_tokens, HIDDEN)
    _compare(
        part,
        "liger_rms_norm_vs_ours",
        f"{num_tokens} x {HIDDEN}",
        _with_gradient(lambda: functional.liger_rms_norm(x, weight, 1e-6, in_place=False), [x], dy),
        _with_gradient(lambda: rms_norm(x, weight, 1e-6), [x], dy),
    )
    gate_up = random(num_tokens, 2 * INNER).requires_grad_()
    dy = random(num_tokens, INNER)
    _compare(
        part,
        "liger_swiglu_vs_ours",
        f"{num_tokens} x {INNER}",
        # Two tensors of it, as Liger wants them.
        _with_gradient(lambda: functional.liger_swiglu(*gate_up.chunk(2, -1)), [gate_up], dy),
        _with_gradient(lambda: swiglu(gate_up), [gate_up], dy),
    )
    _liger_loss(part, functional.liger_fused_linear_cross_entropy, random, num_tokens // 4)


def _liger_loss(
    part: Part,
    linear_loss: Callable[..., Tensor],
    random: Callable[..., Tensor],
    num_tokens: int,
) -> None:
    """Of one target a token, summed; both give the gradient by the tokens."""
    words = 1000 if part.tiny else VOCABULARY
    h, weight = random(num_tokens, HIDDEN), random(words, HIDDEN, scale=3 / HIDDEN**0.5)
    rows = torch.arange(num_tokens, device=h.device)
    targets = (rows * 37) % words
    d_logps = torch.full((num_tokens,), -1.0, device=h.device)

    def theirs() -> Tensor:
        leaf = h.detach().requires_grad_()
        return torch.autograd.grad(linear_loss(leaf, weight, targets, reduction="sum"), leaf)[0]

    def ours() -> Tensor:
        found = linear_logprob(h, weight, rows, targets, gradient=True)
        return linear_logprob_backward(found, weight, rows, targets, d_logps)

    what = f"{num_tokens} tokens, {words} words"
    _compare(part, "liger_linear_loss_vs_ours", what, theirs, ours)


def _with_gradient(
    function: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor
) -> Callable[[], Tensor]:
    """Forward and backward; the gradients, flat."""

    def run() -> Tensor:
        # A copy: whoever writes into what comes down must not spoil the next round.
        grads = torch.autograd.grad(function(), leaves, dy.clone())
        return torch.cat([grad.flatten() for grad in grads])

    return run


def _compare(
    part: Part, row: str, what: str, baseline: Callable[[], Tensor], other: Callable[[], Tensor]
) -> None:
    """Seconds of `baseline` ÷ those of `other`, if both give the same."""
    expected, found = baseline().float(), other().float()
    error = float((found - expected).norm() / expected.norm())
    part.config[f"{row}_difference"] = error
    # Written so that a NaN is none.
    if not error < NEAR:
        raise RuntimeError(f"{row}: they differ by {error:.1e} of their norm")
    functions = {"baseline": baseline, "other": other}
    seconds = in_turn(torch.device(part.device), functions, 5 if part.tiny else 30)
    median = statistics.median(seconds["other"]) * 1e3
    against = f"{what}, {median:.3f} ms"
    part.add(row, ratios(seconds["baseline"], seconds["other"]), against=against)
