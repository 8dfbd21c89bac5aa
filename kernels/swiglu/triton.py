"""Triton: elementwise, float32 between load and store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


def forward(gate_up: Tensor) -> Tensor:
    """[T, 2I] → [T, I]."""
    x = _contiguous_in_width(gate_up)
    num_rows, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    block = min(_BLOCK, triton.next_power_of_2(width))
    _forward_kernel[(num_rows, triton.cdiv(width, block))](
        x, y, width, x.stride(0), BLOCK=block, num_warps=4
    )
    return y


def backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    """[T, 2I] gradient of `gate_up`."""
    x, dy = _contiguous_in_width(gate_up), _contiguous_in_width(dy)
    num_rows, width = dy.shape
    dx = torch.empty(num_rows, 2 * width, dtype=x.dtype, device=x.device)
    block = min(_BLOCK, triton.next_power_of_2(width))
    _backward_kernel[(num_rows, triton.cdiv(width, block))](
        x, dy, dx, width, x.stride(0), dy.stride(0), BLOCK=block, num_warps=4
    )
    return dx


def _contiguous_in_width(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def _forward_kernel(x, y, width, x_t, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    gate = tl.load(x + row * x_t + column, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_t + width + column, mask=ok, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(y + row * width + column, out.to(y.dtype.element_ty), mask=ok)


@triton.jit
def _backward_kernel(x, dy, dx, width, x_t, dy_t, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < width
    gate = tl.load(x + row * x_t + column, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_t + width + column, mask=ok, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_t + column, mask=ok, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = d * gate * sigmoid
    to = dx + row * 2 * width + column
    tl.store(to, d_gate.to(dx.dtype.element_ty), mask=ok)
    tl.store(to + width, d_up.to(dx.dtype.element_ty), mask=ok)
