"""Rotary position embedding, half-split ("neox") form.

    y₁ = x₁·cos − x₂·sin        y₂ = x₂·cos + x₁·sin        (x₁, x₂: the halves of a head)

A rotation: its backward is the rotation by the opposite angle and reads neither input nor output,
so a recorded output (keys in the KV pool) needs no recorded input.  Source: RoFormer, arXiv
2104.09864.

`norm_rope` is q/k-norm and rotation in one: on a GPU one Triton kernel a direction, one read and
one write of the heads less in each. Not run on a GPU yet.

Shapes: T tokens, N heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alchemist.kernels.dispatch import row_slices, uses_triton
from alchemist.kernels.rms_norm import rms_norm


def rope(x_TND: Tensor, cos_TF: Tensor, sin_TF: Tensor, recorded: Tensor | None = None) -> Tensor:
    """Rotate every head. `cos_TF`, `sin_TF`: [T, D/2] in x's dtype (in Triton also float32), attention scaling
    included.
    """
    y: Tensor = _Rope.apply(x_TND, cos_TF, sin_TF, recorded)
    return y


def norm_rope(
    x_TND: Tensor,
    weight_D: Tensor,
    eps: float,
    cos_TF: Tensor,
    sin_TF: Tensor,
    recorded: Tensor | None = None,
) -> Tensor:
    """`rope` of `rms_norm(x)`. The weight gets no gradient; the backward reads x, not the output."""
    if not uses_triton(x_TND):
        return rope(rms_norm(x_TND, weight_D, eps), cos_TF, sin_TF, recorded)
    y: Tensor = _NormRope.apply(x_TND, weight_D, eps, cos_TF, sin_TF, recorded)
    return y


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if uses_triton(x):
        from . import triton

        return triton.forward(x, cos, sin)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in row_slices(x):
        c, s = cos[rows], sin[rows]
        (x1, x2), (y1, y2) = (t[rows].chunk(2, dim=-1) for t in (x, y))
        torch.mul(x1, c, out=y1).addcmul_(x2, s, value=-1)
        torch.mul(x2, c, out=y2).addcmul_(x1, s)
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, recorded: Tensor | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin) if recorded is None else recorded.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if uses_triton(dy):
            from . import triton

            return triton.backward(dy, cos, sin), None, None, None
        return _rotate(dy, cos, sin.neg()), None, None, None


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        recorded: Tensor | None,
    ) -> Tensor:
        from . import triton

        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return triton.forward(x, cos, sin, weight, eps) if recorded is None else recorded.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from . import triton

        x, weight, cos, sin = ctx.saved_tensors
        dx = triton.backward(dy, cos, sin, x, weight, ctx.eps)
        return dx, None, None, None, None, None
