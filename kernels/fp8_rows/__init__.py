"""Rows in eight bits: e4m3 with one float32 scale a row.

    scale = max|x| / 448          stored = e4m3(x / scale)          x̂ = stored · scale

Half the bytes of bf16. |x̂ − x| ≤ max(|x| / 16, scale / 1024): three bits of mantissa, and below
scale · 2⁻⁶ a fixed step. For `gate_up`, the widest of the recorded activations.

An encoded row is bytes: D of them, then the scale's four. On a GPU one Triton kernel a direction.
Not run on a GPU yet.

Shapes: T tokens, D width, a multiple of 4.  Source: FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alchemist.kernels.dispatch import uses_triton

LARGEST = 448.0
"""Largest finite e4m3."""
SCALE_BYTES = 4


def encode(x_TD: Tensor) -> Tensor:
    """uint8 [T, D + 4]. `x_TD` is finite.

    Raises:
        ValueError: D is not a multiple of 4.
    """
    num_rows, width = x_TD.shape
    if width % SCALE_BYTES:
        raise ValueError(f"rows are {width} wide, must be a multiple of {SCALE_BYTES}")
    out = torch.empty(num_rows, width + SCALE_BYTES, dtype=torch.uint8, device=x_TD.device)
    stored, scales = _parts(out)
    if uses_triton(x_TD):
        from . import triton

        triton.encode(x_TD, stored, scales)
        return out
    wide = x_TD.float()
    # A row of zeros has any scale.
    scales.copy_((wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_(min=_TINY))
    stored.copy_((wide / scales).to(stored.dtype))
    return out


def decode(encoded: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, D] of `dtype` from what `encode` gave, or a copy of its bytes."""
    stored, scales = _parts(encoded)
    out = torch.empty(stored.shape, dtype=dtype, device=encoded.device)
    if uses_triton(out):
        from . import triton

        triton.decode(stored, scales, out)
        return out
    return out.copy_(stored.float() * scales)


_TINY = 2.0**-100


def _parts(encoded: Tensor) -> tuple[Tensor, Tensor]:
    """Views: e4m3 [T, D], float32 [T, 1]."""
    width = encoded.shape[1] - SCALE_BYTES
    return encoded[:, :width].view(torch.float8_e4m3fn), encoded[:, width:].view(torch.float32)
