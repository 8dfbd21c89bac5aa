"""cuBLAS for the two products of a chunk, Triton for the softmax between them.

Logits are the product's float32 sums, never rounded to 16 bits. No number is brought to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alchemist.kernels.dispatch import wide_mm

# Logits of a chunk; its probabilities take half of it again. 512 MiB are 880 tokens of 152k words,
# enough rows for the products to run at full rate.
CHUNK_BYTES = 512 << 20

_BLOCK = 4096


def forward(
    h: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(log-probabilities [P] float32, excess rows [T, D] or None)."""
    num_tokens, num_words, num_pairs = h.shape[0], weight.shape[0], rows.shape[0]
    logps = torch.empty(num_pairs, dtype=torch.float32, device=h.device)
    excess = torch.empty_like(h) if gradient else None
    starts = _starts(rows, num_tokens)
    num_chunks = -(-num_tokens * num_words * 4 // CHUNK_BYTES)
    size = max(1, -(-num_tokens // max(1, num_chunks)))
    block = min(_BLOCK, triton.next_power_of_2(num_words))
    for start in range(0, num_tokens, size):
        logits = wide_mm(h[start : start + size], weight.T)
        n = logits.shape[0]
        logsumexp = torch.empty(n, dtype=torch.float32, device=h.device)
        probabilities = torch.empty(logits.shape, dtype=h.dtype, device=h.device) if gradient else h
        _softmax_kernel[(n,)](
            logits,
            probabilities,
            logsumexp,
            starts[start:],
            targets,
            num_words,
            WITH_PROBABILITIES=gradient,
            BLOCK=block,
            num_warps=8,
        )
        _pick_kernel[(triton.cdiv(num_pairs, 128),)](
            logits, logsumexp, rows, targets, logps, start, n, num_words, num_pairs, BLOCK=128
        )
        if excess is not None:
            torch.mm(probabilities, weight, out=excess[start : start + n])
    return logps, excess


def backward(
    excess: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, d_logps: Tensor
) -> Tensor:
    """d h [T, D]: every token adds up its own pairs, so the order of the sum is fixed."""
    num_tokens, width = excess.shape
    starts = _starts(rows, num_tokens)
    d_h = torch.empty_like(excess)
    block = min(1024, triton.next_power_of_2(width))
    _backward_kernel[(num_tokens, triton.cdiv(width, block))](
        excess, weight, starts, targets, d_logps.contiguous(), d_h, width, BLOCK=block
    )
    return d_h


def _starts(rows: Tensor, num_tokens: int) -> Tensor:
    """[T + 1] where each token's pairs begin."""
    return torch.searchsorted(rows, torch.arange(num_tokens + 1, device=rows.device))


@triton.jit
def _softmax_kernel(
    logits,
    probabilities,
    logsumexp,
    starts,
    targets,
    num_words,
    WITH_PROBABILITIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * num_words
    lane = tl.arange(0, BLOCK)
    # Every lane keeps the maximum and the sum of its own words; they meet at the end. Finite at
    # first: −inf less −inf is not a number.
    top = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_words, BLOCK):
        word = start + lane
        x = tl.load(logits + word, mask=word < num_words, other=-float("inf"))
        new = tl.maximum(top, x)
        total = total * tl.exp(top - new) + tl.exp(x - new)
        top = new
    peak = tl.max(top, axis=0)
    lse = peak + tl.log(tl.sum(total * tl.exp(top - peak), axis=0))
    tl.store(logsumexp + row, lse)
    if WITH_PROBABILITIES:
        probabilities += row * num_words
        pair = tl.load(starts + row)
        has_pair = pair < tl.load(starts + row + 1)
        first = tl.load(targets + pair, mask=has_pair, other=-1)
        for start in range(0, num_words, BLOCK):
            word = start + lane
            x = tl.load(logits + word, mask=word < num_words, other=-float("inf"))
            p = tl.exp(x - lse) - tl.where(word == first, 1.0, 0.0)
            p = p.to(probabilities.dtype.element_ty)
            tl.store(probabilities + word, p, mask=word < num_words)


@triton.jit
def _pick_kernel(
    logits,
    logsumexp,
    rows,
    targets,
    logps,
    start,
    num_rows,
    num_words,
    num_pairs,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + pair, mask=pair < num_pairs, other=-1) - start
    mine = (row >= 0) & (row < num_rows)
    target = tl.load(targets + pair, mask=mine, other=0)
    logit = tl.load(logits + row * num_words + target, mask=mine, other=0.0)
    lse = tl.load(logsumexp + row, mask=mine, other=0.0)
    tl.store(logps + pair, logit - lse, mask=mine)


@triton.jit
def _backward_kernel(excess, weight, starts, targets, d_logps, d_h, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    total = 0.0
    acc = tl.zeros([BLOCK], tl.float32)
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    first = tl.load(targets + begin, mask=begin < end, other=0)
    base = tl.load(weight + first * width + column, mask=ok, other=0.0).to(tl.float32)
    for pair in range(begin, end):
        d = tl.load(d_logps + pair)
        target = tl.load(targets + pair)
        w = tl.load(weight + target * width + column, mask=ok, other=0.0)
        acc += d * (w.to(tl.float32) - base)
        total += d
    e = tl.load(excess + row * width + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(d_h + row * width + column, (acc - total * e).to(d_h.dtype.element_ty), mask=ok)
