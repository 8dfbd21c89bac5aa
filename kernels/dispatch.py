"""What runs where: Triton on a GPU, plain torch elsewhere.

With `TRITON_INTERPRET=1` in the environment CPU tensors take the kernels too, in Triton's
interpreter: slow, for tests. Triton is imported by the first call that needs it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_HALF = (torch.bfloat16, torch.float16)


def uses_triton(x: Tensor) -> bool:
    """Whether the operation on `x` is a Triton kernel. float64 never is: it is for checks."""
    return (x.is_cuda or _INTERPRET) and x.dtype in (*_HALF, torch.float32)


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; of 16-bit matrices on a GPU the float32 sums, not rounded to 16 bits."""
    if a.is_cuda and a.dtype in _HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b
