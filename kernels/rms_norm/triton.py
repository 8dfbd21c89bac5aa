"""Triton: one program normalises a few rows; everything between load and store is float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: rows of attention heads are short and share a program, hidden rows have their own.
_TILE = 2048


def forward(
    x: Tensor, addend: Tensor | None, weight: Tensor, eps: float, recorded: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, norm, reciprocal std [rows] float32). `recorded` is the sum's value."""
    given = as_rows(x if recorded is None else recorded)
    is_added = recorded is None and addend is not None
    other = as_rows(addend) if is_added and addend is not None else given
    shape = given.shape
    summed = torch.empty(shape, dtype=x.dtype, device=x.device) if is_added else given
    normed = torch.empty(shape, dtype=x.dtype, device=x.device)
    num_rows, heads = shape[0] * shape[1], shape[1]
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block, rows, warps = tile(shape[2])
    _forward_kernel[(triton.cdiv(num_rows, rows),)](
        given,
        other,
        weight,
        summed,
        normed,
        rstd,
        num_rows,
        heads,
        *given.stride()[:2],
        *other.stride()[:2],
        shape[2],
        eps,
        IS_ADDED=is_added,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return summed.view(x.shape) if is_added else given.reshape(x.shape), normed.view(x.shape), rstd


def backward(
    summed: Tensor, rstd: Tensor, weight: Tensor, d_normed: Tensor, d_sum: Tensor | None
) -> Tensor:
    """Gradient of the sum: through the norm, plus `d_sum`."""
    s, dn = as_rows(summed), as_rows(d_normed)
    ds = dn if d_sum is None else as_rows(d_sum)
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    num_rows = s.shape[0] * s.shape[1]
    block, rows, warps = tile(s.shape[2])
    _backward_kernel[(triton.cdiv(num_rows, rows),)](
        s,
        rstd,
        weight,
        dn,
        ds,
        dx,
        num_rows,
        s.shape[1],
        *s.stride()[:2],
        *dn.stride()[:2],
        *ds.stride()[:2],
        s.shape[2],
        HAS_SUM=d_sum is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return dx.view(summed.shape)


def as_rows(x: Tensor) -> Tensor:
    """[T, heads, D], contiguous in D; of two- and three-dimensional tensors a view where it can be."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() == 3:
        return x
    return x.unsqueeze(1) if x.dim() == 2 else x.reshape(-1, 1, x.shape[-1])


def tile(width: int) -> tuple[int, int, int]:
    """(elements of a padded row, rows of a program, warps)."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return block, rows, min(16, max(2, block * rows // 512))


@triton.jit
def _forward_kernel(
    x,
    addend,
    weight,
    summed,
    normed,
    rstd,
    num_rows,
    heads,
    x_t,
    x_h,
    addend_t,
    addend_h,
    width,
    eps,
    IS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token, head = row // heads, row % heads
    ok = (row < num_rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    s = tl.load(x + (token * x_t + head * x_h)[:, None] + column[None, :], mask=ok, other=0.0)
    if IS_ADDED:
        place = (token * addend_t + head * addend_h)[:, None] + column[None, :]
        a = tl.load(addend + place, mask=ok, other=0.0)
        # The sum is rounded before its statistics are taken: it is what serving records.
        s = (s.to(tl.float32) + a.to(tl.float32)).to(s.dtype)
        tl.store(summed + at, s, mask=ok)
    wide = s.to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    tl.store(rstd + row, r, mask=row < num_rows)
    w = tl.load(weight + column, mask=column < width, other=0.0)
    n = wide * r[:, None] * w.to(tl.float32)[None, :]
    tl.store(normed + at, n.to(s.dtype), mask=ok)


@triton.jit
def _backward_kernel(
    summed,
    rstd,
    weight,
    d_normed,
    d_sum,
    dx,
    num_rows,
    heads,
    s_t,
    s_h,
    dn_t,
    dn_h,
    ds_t,
    ds_h,
    width,
    HAS_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token, head = row // heads, row % heads
    ok = (row < num_rows)[:, None] & (column < width)[None, :]
    s = tl.load(summed + (token * s_t + head * s_h)[:, None] + column[None, :], mask=ok, other=0.0)
    place = (token * dn_t + head * dn_h)[:, None] + column[None, :]
    dn = tl.load(d_normed + place, mask=ok, other=0.0)
    w = tl.load(weight + column, mask=column < width, other=0.0)
    r = tl.load(rstd + row, mask=row < num_rows, other=0.0)
    wide = s.to(tl.float32)
    g = dn.to(tl.float32) * w.to(tl.float32)[None, :]
    mean = tl.sum(g * wide, axis=1) / width
    d = (g - wide * (mean * r * r)[:, None]) * r[:, None]
    if HAS_SUM:
        place = (token * ds_t + head * ds_h)[:, None] + column[None, :]
        d += tl.load(d_sum + place, mask=ok, other=0.0).to(tl.float32)
    tl.store(dx + row[:, None] * width + column[None, :], d.to(s.dtype), mask=ok)
