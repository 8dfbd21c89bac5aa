"""Rows in eight bits: e4m3 with one float32 scale a row.

    scale = max|x| / 448          stored = e4m3(x / scale)          x̂ = stored · scale

Half the bytes of bf16. |x̂ − x| ≤ max(|x| / 16, scale / 1024): three bits of mantissa, and below
scale · 2⁻⁶ a fixed step. For `gate_up`, the widest of the recorded activations
(`--activation-dtype fp8`).

An encoded row is bytes, D of them, then the scale's four, in as many elements of x's dtype as they
need: it is copied to wherever activations go, and means nothing as numbers. On a GPU one Triton
kernel a direction. Not run on a GPU yet.

Shapes: T tokens, D width, a multiple of 4.  Source: FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from alchemist.kernels.dispatch import uses_triton

LARGEST = 448.0
"""Largest finite e4m3."""
SCALE_BYTES = 4


def encode(x_TD: Tensor) -> Tensor:
    """[T, ⌈(D + 4) / bytes of an element⌉] of x's dtype. `x_TD` is finite.

    Raises:
        ValueError: D is not a multiple of 4.
    """
    num_rows, width = x_TD.shape
    if width % SCALE_BYTES:
        raise ValueError(f"rows are {width} wide, must be a multiple of {SCALE_BYTES}")
    stored_width = -(-(width + SCALE_BYTES) // x_TD.dtype.itemsize)
    out = torch.empty(num_rows, stored_width, dtype=x_TD.dtype, device=x_TD.device)
    stored, scales = _parts(out, width)
    if uses_triton(x_TD):
        from . import triton

        triton.encode(x_TD, stored, scales)
        return out
    for x, codes, scale in _in_portions(x_TD, stored, scales):
        wide = x.float()
        # A row of zeros has any scale.
        scale.copy_((wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_(min=_TINY))
        codes.copy_(wide / scale)
    return out


def decode(encoded: Tensor, out_TD: Tensor) -> None:
    """Fill `out_TD`, of any dtype and contiguous in D, from what `encode` gave or a copy of its bits."""
    stored, scales = _parts(encoded, out_TD.shape[1])
    if uses_triton(out_TD):
        from . import triton

        triton.decode(stored, scales, out_TD)
        return
    for codes, scale, out in _in_portions(stored, scales, out_TD):
        # torch's own conversion takes three times as long. Bits of e4m3 are those of a float32 of
        # 2⁻¹²⁰ the value, but for where they are.
        bits = codes.view(torch.int8).int().bitwise_left_shift_(20).bitwise_and_(_SIGN_AND_CODE)
        out.copy_(bits.view(torch.float32).mul_(2.0**120).mul_(scale))


_TINY = 2.0**-100
_SIGN_AND_CODE = 0x87F00000 - (1 << 32)
_PORTION = 1 << 16
"""Elements that are converted at a time: what lies between stays in cache."""


def _in_portions(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few rows of each."""
    num_rows = max(1, _PORTION // max(1, *(t.shape[1] for t in tensors)))
    for start in range(0, len(tensors[0]), num_rows):
        yield tuple(t[start : start + num_rows] for t in tensors)


def _parts(encoded: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Views: e4m3 [T, width], float32 [T, 1]."""
    data = encoded.view(torch.uint8)
    scales = data[:, width : width + SCALE_BYTES]
    return data[:, :width].view(torch.float8_e4m3fn), scales.view(torch.float32)
