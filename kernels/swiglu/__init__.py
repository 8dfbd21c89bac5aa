"""SwiGLU over a fused [gate | up] tensor: silu(gate) · up.

The input is what serving records; the output is recomputed here and its backward needs only the
input.

On a GPU each direction is one Triton kernel. Liger's were not taken: they want gate and up as two
tensors, and write the gradients over them, which here are borrowed rows. Not run on a GPU yet.

Shapes: T tokens, I intermediate width.  Source: arXiv 2002.05202.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alchemist.kernels.dispatch import row_slices, uses_triton


def swiglu(gate_up: Tensor) -> Tensor:
    """[T, 2I] → [T, I]."""
    y: Tensor = _Swiglu.apply(gate_up)
    return y


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if uses_triton(gate_up):
            from . import triton

            return triton.forward(gate_up)
        y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        for rows in row_slices(y):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate), up, out=y[rows])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return gradient(gate_up, dy)


def gradient(gate_up: Tensor, dy: Tensor) -> Tensor:
    """Gradient of `gate_up`, [T, 2I], for that of the output, [T, I]."""
    if uses_triton(gate_up):
        from . import triton

        return triton.backward(gate_up, dy)
    d_gate_up = torch.empty_like(gate_up)
    for rows in row_slices(dy):
        gate, up = gate_up[rows].chunk(2, dim=-1)
        d_gate, d_up = d_gate_up[rows].chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), dy[rows], out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy[rows] * up, gate, grad_input=d_gate)
    return d_gate_up
