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

from alchemist.kernels.dispatch import uses_triton

# Rows worked on at once: three [rows, I] buffers stay in a core's cache.
_ROWS = 128


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
        for chunk, out in zip(gate_up.split(_ROWS), y.split(_ROWS), strict=True):
            gate, up = chunk.chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate), up, out=out)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if uses_triton(gate_up):
            from . import triton

            return triton.backward(gate_up, dy)
        d_gate_up = torch.empty_like(gate_up)
        for chunk, d_out, d_in in zip(
            gate_up.split(_ROWS), dy.split(_ROWS), d_gate_up.split(_ROWS), strict=True
        ):
            gate, up = chunk.chunk(2, dim=-1)
            d_gate, d_up = d_in.chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate), d_out, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_out * up, gate, grad_input=d_gate)
        return d_gate_up
