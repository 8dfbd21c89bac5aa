"""RMSNorm, alone and fused with the residual addition before it.

    s = x + addend          (or s = x)
    n = s / sqrt(mean(s²) + eps) · w

Statistics in float32 (float64 inputs: float64), and rounded to the input's dtype once, after the weight, as SGLang
serves it (transformers rounds before the weight, too). The norm's output is never recorded: it is elementwise, and
recomputed. `s` may be recorded.

On a GPU each direction is one Triton kernel. Liger's were not taken: its backward always computes
the gradient of the weight, and it cannot start from a recorded sum. Not run on a GPU yet.

Shapes: T tokens (any leading shape), D normalised width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alchemist.kernels.dispatch import row_slices, uses_triton


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension. The weight gets no gradient."""
    _, normed = _AddRmsNorm.apply(x_TD, None, weight_D, eps, None)
    return normed


def add_rms_norm(
    x_TD: Tensor,
    addend_TD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    recorded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(residual sum, its norm). The two gradients that reach the sum are added in one pass.

    Args:
        addend_TD: added to `x_TD`; None: nothing is.
        recorded: the sum's value [T, D]; then neither summand is read.
    """
    summed, normed = _AddRmsNorm.apply(x_TD, addend_TD, weight_D, eps, recorded)
    return summed, normed


def _reciprocal_std(x: Tensor, eps: float) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return (
        torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        .square_()
        .div_(x.shape[-1])
        .add_(eps)
        .rsqrt_()
    )


def _gradient(
    summed: Tensor, rstd: Tensor, weight: Tensor, d_normed: Tensor, room: Tensor | None
) -> Tensor:
    """rstd · (g − s · mean(g·s) · rstd²) with g = dn · w, in rstd's dtype; in `room` if there is some."""
    g = torch.mul(d_normed.to(rstd.dtype), weight, out=room)
    mean = torch.linalg.vecdot(g, summed.to(rstd.dtype)).unsqueeze(-1).div_(summed.shape[-1])
    return g.addcmul_(summed, mean.mul_(rstd.square()), value=-1).mul_(rstd)


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        addend: Tensor | None,
        weight: Tensor,
        eps: float,
        recorded: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.has_addend = addend is not None
        ctx.set_materialize_grads(False)
        if uses_triton(x):
            from . import triton

            summed, normed, rstd = triton.forward(x, addend, weight, eps, recorded)
            ctx.save_for_backward(summed, rstd, weight)
            return summed.detach(), normed
        known = recorded if recorded is not None or addend is not None else x
        summed = torch.empty_like(x) if known is None else known.detach()
        normed = torch.empty_like(summed, memory_format=torch.contiguous_format)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rstd = normed.new_empty(*normed.shape[:-1], 1, dtype=wide)
        narrow = x.dtype != wide
        for rows in row_slices(summed):
            if known is None:
                torch.add(x[rows], addend[rows], out=summed[rows])
            part = summed[rows]
            rstd[rows] = _reciprocal_std(part, eps)
            if narrow:
                normed[rows] = (part * rstd[rows]).mul_(weight)
            else:
                torch.mul(part, rstd[rows], out=normed[rows]).mul_(weight)
        ctx.save_for_backward(summed, rstd, weight)
        return summed, normed

    @staticmethod
    def backward(
        ctx: Any, d_sum: Tensor | None, d_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        summed, rstd, weight = ctx.saved_tensors
        dx = d_sum
        if d_normed is not None and uses_triton(summed):
            from . import triton

            dx = triton.backward(summed, rstd, weight, d_normed, d_sum)
        elif d_normed is not None:
            dx = torch.empty_like(summed, memory_format=torch.contiguous_format)
            for rows in row_slices(summed):
                room = dx[rows] if dx.dtype == rstd.dtype else None
                g = _gradient(summed[rows], rstd[rows], weight, d_normed[rows], room)
                if room is None:
                    # In 16 bits the two gradients are rounded before they are added, as autograd does.
                    dx[rows] = g
                if d_sum is not None:
                    dx[rows] += d_sum[rows]
        return dx, dx if ctx.has_addend else None, None, None, None
