"""Rotary position embedding, half-split ("neox") form.

    y₁ = x₁·cos − x₂·sin        y₂ = x₂·cos + x₁·sin        (x₁, x₂: the halves of a head)

A rotation: its backward is the rotation by the opposite angle and reads neither input nor output,
so a recorded output (keys in the KV pool) needs no recorded input.  Source: RoFormer, arXiv
2104.09864.

Shapes: T tokens, N heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rope(x_TND: Tensor, cos_TF: Tensor, sin_TF: Tensor, recorded: Tensor | None = None) -> Tensor:
    """Rotate every head. `cos_TF`, `sin_TF`: [T, D/2] in x's dtype, attention scaling included."""
    y: Tensor = _Rope.apply(x_TND, cos_TF, sin_TF, recorded)
    return y


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y1, y2 = y.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, recorded: Tensor | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin) if recorded is None else recorded.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin.neg()), None, None, None
