"""Gated MLP with LoRA whose inner value may be recorded.

    gate, up = x W₁ᵀ + adapters        y = (silu(gate) · up) W₂ᵀ + adapters

Both directions go over the tokens in pieces: of all tokens at once there is nothing as wide as the inner layer but the
fused [gate | up], and not even its gradient. In the middle of a training step of thousands of tokens those would be
most of what is in memory, and of what a CPU writes there and reads again. On a GPU, and in 16 bits, where sums over
tokens are rounded once, all tokens are one piece.

With a recorded [gate | up] the forward does nothing.

Shapes: T tokens, H hidden, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alchemist.kernels import dispatch
from alchemist.kernels.replay_linear import LoraPart, gradients, replay_linear, unread
from alchemist.kernels.swiglu import gradient as swiglu_gradient
from alchemist.kernels.swiglu import swiglu

MOST_TOKENS = 768
"""Tokens in a piece, at most. Shorter pieces pack both weights more often; longer ones leave more than caches hold."""

Pause = Callable[[Tensor], Tensor]
"""Passes on what an operation has made; may block, also when its gradient has come."""


def no_pause(value: Tensor) -> Tensor:
    return value


class Projection(NamedTuple):
    """A linear of the MLP: weight [E, D], bias [E], adapters."""

    weight: Tensor
    bias: Tensor | None
    parts: Sequence[LoraPart]


def gated_mlp(
    x_TH: Tensor,
    gate_up: Projection,
    down: Projection,
    scaling: float,
    recorded: Tensor | None = None,
    *,
    keep: bool = True,
    pause: Pause = no_pause,
) -> tuple[Tensor, Tensor]:
    """[gate | up] [T, 2I], which gets no gradient, and the output [T, H].

    Args:
        recorded: [T, 2I], returned as it is (borrowed, not copied); the output is a placeholder then (`unread`).
        keep: whether [gate | up] is wanted, as a backward does; else a placeholder is returned for it.
        pause: called with what has been made, between products.
    """
    meta = _Meta(gate_up, down, scaling, keep, pause)
    lora = [matrix for part in (*gate_up.parts, *down.parts) for matrix in (part.a, part.b)]
    outputs: tuple[Tensor, Tensor] = _GatedMlp.apply(x_TH, recorded, meta, *lora)
    return outputs


class _Meta(NamedTuple):
    gate_up: Projection
    down: Projection
    scaling: float
    keep: bool
    pause: Pause

    def inner(self, x: Tensor) -> Tensor:
        """[gate | up]."""
        (y,) = replay_linear(x, *self.gate_up, self.scaling)
        return self.pause(y)

    def output(self, gate_up: Tensor) -> Tensor:
        (y,) = replay_linear(self.pause(swiglu(gate_up)), *self.down, self.scaling)
        return y


def num_pieces(num_tokens: int, device: torch.device, dtype: torch.dtype) -> int:
    """In how many pieces, as even as can be, the tokens are taken."""
    if not dispatch.goes_in_pieces(device, dtype):
        return 1
    return max(1, -(-num_tokens // MOST_TOKENS))


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, recorded: Tensor | None, meta: _Meta, *lora: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.meta = meta
        ctx.set_materialize_grads(False)
        if recorded is not None:
            ctx.save_for_backward(x, recorded, *lora)
            recorded = recorded.detach()
            ctx.mark_non_differentiable(recorded)
            return recorded, unread(x.shape, x)
        count = num_pieces(x.shape[0], x.device, x.dtype)
        if meta.keep:
            whole = meta.inner(x)
            ctx.save_for_backward(x, whole, *lora)
            y = _whole([meta.output(known) for known in whole.chunk(count)])
        else:
            whole = unread((x.shape[0], meta.gate_up.weight.shape[0]), x)
            y = _whole([meta.output(meta.inner(piece)) for piece in x.chunk(count)])
        ctx.mark_non_differentiable(whole)
        return whole, y

    @staticmethod
    def backward(ctx: Any, _: None, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, *lora = ctx.saved_tensors
        meta: _Meta = ctx.meta
        needs_x, needs_lora = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        cut = 2 * len(meta.gate_up.parts)
        ups, downs = (
            [p._replace(a=a, b=b) for p, a, b in zip(parts, own[::2], own[1::2], strict=True)]
            for parts, own in ((meta.gate_up.parts, lora[:cut]), (meta.down.parts, lora[cut:]))
        )
        needs_inner = needs_x or any(needs_lora[:cut])
        count = num_pieces(x.shape[0], x.device, x.dtype)
        dx: list[Tensor] = []
        total: list[Tensor | None] = [None] * len(lora)
        for x_piece, known, dy_piece in zip(
            x.chunk(count), gate_up.chunk(count), dy.chunk(count), strict=True
        ):
            d_inner, found = gradients(
                swiglu(known),
                meta.down.weight,
                downs,
                meta.scaling,
                (dy_piece,),
                needs_x=needs_inner,
                needs_lora=needs_lora[cut:],
            )
            _add(total, found, cut)
            if d_inner is None:
                continue
            d_gate_up = swiglu_gradient(known, meta.pause(d_inner))
            dx_piece, found = gradients(
                x_piece,
                meta.gate_up.weight,
                ups,
                meta.scaling,
                (meta.pause(d_gate_up),),
                needs_x=needs_x,
                needs_lora=needs_lora[:cut],
            )
            _add(total, found, 0)
            # Not to be held beside the next piece's.
            del d_inner, d_gate_up
            if dx_piece is not None:
                dx.append(dx_piece)
        return (_whole(dx) if dx else None, None, None, *total)


def _whole(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _add(total: list[Tensor | None], found: Sequence[Tensor | None], start: int) -> None:
    """Add a piece's gradients to those of the matrices from `start` on."""
    for i, gradient in enumerate(found, start):
        so_far = total[i]
        total[i] = gradient if so_far is None or gradient is None else so_far.add_(gradient)
