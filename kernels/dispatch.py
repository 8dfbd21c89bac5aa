"""What runs where: Triton on a GPU, plain torch elsewhere; and matrix products whose form depends on it.

With `TRITON_INTERPRET=1` in the environment CPU tensors take the kernels too, in Triton's
interpreter: slow, for tests. Triton is imported by the first call that needs it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HALF = (torch.bfloat16, torch.float16)

LARGE = 1 << 20
"""Elements of a right-hand factor from which on `matmul` may work by blocks; a smaller one stays in the cache."""
COLUMNS = 256
ROWS = 512
"""Its columns, and rows of the left-hand factor, at most, in a block."""
TRIAL_ROWS = 1024
"""Rows, at most, of the products by which `matmul` finds out what is faster."""
TRIALS = 3
CLEARLY = 0.95
"""The share of the plain product's time that blocks may take at most to be chosen."""
CACHED = 1 << 18
"""Elements of which a few buffers stay in a CPU's cache."""


def uses_triton(x: Tensor) -> bool:
    """Whether the operation on `x` is a Triton kernel. float64 never is: it is for checks."""
    return (x.is_cuda or _INTERPRET) and x.dtype in (*HALF, torch.float32)


def row_slices(x: Tensor) -> Iterator[slice]:
    """About `CACHED` elements at a time, for elementwise work of several passes on a CPU: all but the first find them
    in the cache.
    """
    rows = x.shape[0]
    step = max(1, CACHED * rows // max(1, x.numel()))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; of 16-bit matrices on a GPU the float32 sums, not rounded to 16 bits."""
    if a.is_cuda and a.dtype in HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    return matmul(a, b)


def goes_in_pieces(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether many tokens are worked on some at a time: not on a GPU, nor where every sum is rounded to 16 bits."""
    return device.type != "cuda" and dtype not in HALF


def goes_by_blocks(a: Tensor, b: Tensor) -> bool:
    """Whether `matmul` is not just a @ b. Of sizes that are new to this process both are tried first."""
    if a.shape[0] <= 1 or b.numel() < LARGE or not goes_in_pieces(a.device, a.dtype):
        return False
    # To a power of two: tokens are as many as a batch happens to have.
    sizes = (min(a.shape[0], TRIAL_ROWS), *b.shape)
    bits = tuple(size.bit_length() for size in sizes)
    kind = (bits, b.stride(0) < b.stride(1), b.dtype, torch.get_num_threads())
    if kind not in _by_blocks_is_faster:
        _by_blocks_is_faster[kind] = by_blocks_is_faster(a[:TRIAL_ROWS], b)
    return _by_blocks_is_faster[kind]


_by_blocks_is_faster: dict[object, bool] = {}
"""By kind of product and number of threads, so that a process computes the same one in the same way, to the bit."""


def by_blocks_is_faster(a: Tensor, b: Tensor) -> bool:
    """Clearly, where this runs: the best of a few trials each, in turn."""
    trials = [(_seconds(torch.mm, a, b), _seconds(_by_blocks, a, b)) for _ in range(TRIALS)]
    return min(blocks for _, blocks in trials) < CLEARLY * min(plain for plain, _ in trials)


def _seconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    product(a, b)
    return time.perf_counter() - start


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, contiguous; on a CPU with a large `b`, where it is faster, as batched products over blocks of its columns.

    A CPU's matrix product packs its factors before it begins, and its threads share the result by rows. Of few rows
    packing `b` is most of the work; by blocks, each thread packs what its cache holds. Between processors of one name
    either is faster by up to a half: docs/log.md.
    """
    return _by_blocks(a, b) if goes_by_blocks(a, b) else a @ b


def _by_blocks(a: Tensor, b: Tensor) -> Tensor:
    rows, columns = a.shape[0], b.shape[1]
    count, rest = divmod(columns, COLUMNS)
    blocks = b[:, : columns - rest].view(b.shape[0], count, COLUMNS).transpose(0, 1)
    out = a.new_empty(rows, columns)
    pieces = -(-rows // ROWS)
    for piece, target in zip(a.chunk(pieces), out.chunk(pieces), strict=True):
        product = torch.bmm(piece.expand(count, *piece.shape), blocks)
        whole = target[:, : columns - rest].view(piece.shape[0], count, COLUMNS)
        whole.copy_(product.transpose(0, 1))
        if rest:
            torch.mm(piece, b[:, columns - rest :], out=target[:, columns - rest :])
    return out
