"""Triton: one program rotates a few heads; the q/k-norm before the rotation costs no extra pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alchemist.kernels.rms_norm.triton import as_rows

# Heads of a program: 8 heads of 128 are 2048 elements.
_ELEMENTS = 2048


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """[T, N, D] rotated, contiguous; with `weight` normalised first."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, cos, sin, weight, eps, y, is_backward=False)
    return y


def backward(
    dy: Tensor,
    cos: Tensor,
    sin: Tensor,
    x: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Gradient of x; `x` and `weight` as given to a forward that normalised."""
    dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    _launch(dy, dy if x is None else x, cos, sin, weight, eps, dx, is_backward=True)
    return dx


def _launch(
    given: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    *,
    is_backward: bool,
) -> None:
    given, x = as_rows(given), as_rows(x)
    num_rows, (heads, width) = given.shape[0] * given.shape[1], given.shape[1:]
    block = triton.next_power_of_2(width // 2)
    rows = max(1, _ELEMENTS // (2 * block))
    _rope_kernel[(triton.cdiv(num_rows, rows),)](
        given,
        x,
        cos.contiguous(),
        sin.contiguous(),
        x if weight is None else weight,
        out,
        num_rows,
        heads,
        *given.stride()[:2],
        *x.stride()[:2],
        width // 2,
        eps,
        HAS_NORM=weight is not None,
        IS_BACKWARD=is_backward,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )


@triton.jit
def _rope_kernel(
    given,
    x,
    cos,
    sin,
    weight,
    out,
    num_rows,
    heads,
    given_t,
    given_h,
    x_t,
    x_h,
    half,
    eps,
    HAS_NORM: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token, head = row // heads, row % heads
    ok = (row < num_rows)[:, None] & (column < half)[None, :]
    angle = token[:, None] * half + column[None, :]
    c = tl.load(cos + angle, mask=ok, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=ok, other=0.0).to(tl.float32)
    at = (token * given_t + head * given_h)[:, None] + column[None, :]
    a = tl.load(given + at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(given + at + half, mask=ok, other=0.0).to(tl.float32)
    if HAS_NORM:
        if IS_BACKWARD:
            place = (token * x_t + head * x_h)[:, None] + column[None, :]
            x1 = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
            x2 = tl.load(x + place + half, mask=ok, other=0.0).to(tl.float32)
        else:
            x1, x2 = a, b
        squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        r = tl.rsqrt(squares / (2 * half) + eps)[:, None]
        w1 = tl.load(weight + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight + half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    if IS_BACKWARD:
        y1, y2 = a * c + b * s, b * c - a * s
        if HAS_NORM:
            g1, g2 = y1 * w1, y2 * w2
            mean = (tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)) / (2 * half)
            mean = mean[:, None] * r * r
            y1, y2 = (g1 - x1 * mean) * r, (g2 - x2 * mean) * r
    else:
        if HAS_NORM:
            a, b = a * r * w1, b * r * w2
        y1, y2 = a * c - b * s, b * c + a * s
    to = out + row[:, None] * (2 * half) + column[None, :]
    tl.store(to, y1.to(out.dtype.element_ty), mask=ok)
    tl.store(to + half, y2.to(out.dtype.element_ty), mask=ok)
