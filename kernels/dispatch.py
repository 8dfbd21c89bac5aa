"""What runs where: Triton on a GPU, plain torch elsewhere; and matrix products whose form depends on it.

With `TRITON_INTERPRET=1` in the environment CPU tensors take the kernels too, in Triton's
interpreter: slow, for tests. Triton is imported by the first call that needs it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_HALF = (torch.bfloat16, torch.float16)

FEW_ROWS = 1024
"""Up to here `matmul` works by blocks."""
LARGE = 1 << 20
"""Elements of a right-hand factor from which on it does: a smaller one stays in the cache."""
BLOCK = 256
"""Its columns in a block."""


def uses_triton(x: Tensor) -> bool:
    """Whether the operation on `x` is a Triton kernel. float64 never is: it is for checks."""
    return (x.is_cuda or _INTERPRET) and x.dtype in (*_HALF, torch.float32)


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; of 16-bit matrices on a GPU the float32 sums, not rounded to 16 bits."""
    if a.is_cuda and a.dtype in _HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, contiguous; of few rows and a large `b` on a CPU as one batched product over blocks of b's columns.

    A CPU's matrix product packs its factors before it begins, and shares the work by the rows of the result. Of few
    rows packing `b` is most of the work: by blocks, each packs what its cache holds. Measured in docs/log.md.
    """
    rows, columns = a.shape[0], b.shape[1]
    few = 1 < rows <= FEW_ROWS and b.numel() >= LARGE
    if not few or a.is_cuda or a.dtype in _HALF:
        return a @ b
    count, rest = divmod(columns, BLOCK)
    blocks = b[:, : columns - rest].unflatten(1, (count, BLOCK)).transpose(0, 1)
    product = torch.bmm(a.expand(count, *a.shape), blocks).transpose(0, 1).contiguous().flatten(1)
    return torch.cat([product, a @ b[:, columns - rest :]], dim=1) if rest else product
