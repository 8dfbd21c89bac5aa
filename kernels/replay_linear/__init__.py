"""Linear layer with LoRA whose output may be recorded.

    y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ        for every LoRA part's rows of W

With recorded outputs the forward returns them and does no arithmetic; the backward is the ordinary
one. `x Aᵀ` is recomputed there: it costs a rank's worth of the layer. Base weights get no gradient.

On a GPU one product gives the gradient of x for all outputs. In 16 bits, sums over tokens, and over
outputs for the rank's gradient, leave their product in float32; gradients of `a` and `b` are float32
there: autograd rounds them to the leaf's dtype unless the leaf's `grad_dtype` is float32. Not run
on a GPU yet. To be measured there: what the thin products add to each wide one (both read all of
dy: a kernel that reads it once is worth writing if they take more than a twentieth).

Shapes: T tokens, D inputs, E outputs, R rank.  Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alchemist.kernels.dispatch import goes_by_blocks, matmul, wide_mm


class LoraPart(NamedTuple):
    """An adapter on rows [start, end) of a fused weight. `a` is [R, D], `b` is [end − start, R].

    `b_is_zero` promises that `b` holds only zeros (a fresh adapter): the gradient of `a` is then
    exactly zero and the adapter adds nothing to the gradient of `x`, so neither is computed.
    """

    start: int
    end: int
    a: Tensor
    b: Tensor
    b_is_zero: bool = False


def replay_linear(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    parts: Sequence[LoraPart],
    scaling: float,
    splits: Sequence[int] | None = None,
    recorded: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """The outputs, one per entry of `splits` (widths that add up to E; default: one output).

    Args:
        parts: adapters; each lies inside one split. Their `a` and `b` receive gradients if they
            require them.
        recorded: the outputs' values, returned as they are (borrowed, not copied). A value that no
            later
            backward reads may be a placeholder (`unread`).
    """
    splits = tuple(splits or (weight_ED.shape[0],))
    meta = _Meta(splits, tuple((p.start, p.end, p.b_is_zero) for p in parts), scaling)
    tensors = [t for p in parts for t in (p.a, p.b)]
    outputs: tuple[Tensor, ...] = _ReplayLinear.apply(
        x_TD, weight_ED, bias_E, meta, tuple(recorded) if recorded is not None else None, *tensors
    )
    return outputs


def unread(shape: Sequence[int], like: Tensor) -> Tensor:
    """A value of `shape` that nobody may read: NaN, one element of memory."""
    return torch.full((1,), float("nan"), dtype=like.dtype, device=like.device).expand(*shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, [T, E]."""
    if not goes_by_blocks(x, weight.T):
        # In 16 bits it adds the bias before it rounds.
        return torch.nn.functional.linear(x, weight, bias)
    y = matmul(x, weight.T)
    return y if bias is None else y.add_(bias)


class _Meta(NamedTuple):
    splits: tuple[int, ...]
    ranges: tuple[tuple[int, int, bool], ...]
    scaling: float


class _ReplayLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        meta: _Meta,
        recorded: tuple[Tensor, ...] | None,
        *lora: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, *lora)
        ctx.meta = meta
        ctx.set_materialize_grads(False)
        if recorded is not None:
            return tuple(value.detach() for value in recorded)
        ranges = zip(meta.ranges, lora[::2], lora[1::2], strict=True)
        live = [(start, end, a, b) for (start, end, is_zero), a, b in ranges if not is_zero]
        y_TE = linear(x, weight, bias)
        if live:
            # One thin product for all: for few tokens each takes as long as one of twice its width.
            x_a = (x @ torch.cat([a for _, _, a, _ in live]).T).split(
                [a.shape[0] for _, _, a, _ in live], dim=-1
            )
            for part, (start, end, _, b) in zip(x_a, live, strict=True):
                y_TE[:, start:end].addmm_(part, b.T, alpha=meta.scaling)
        outputs = y_TE.split(meta.splits, dim=-1)
        # On a GPU whatever reads an output takes it as it lies.
        return outputs if x.is_cuda else tuple(y.contiguous() for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, *lora = ctx.saved_tensors
        meta: _Meta = ctx.meta
        matrices = zip(meta.ranges, lora[::2], lora[1::2], strict=True)
        dx, dlora = gradients(
            x,
            weight,
            [LoraPart(start, end, a, b, is_zero) for (start, end, is_zero), a, b in matrices],
            meta.scaling,
            grads,
            meta.splits,
            needs_x=ctx.needs_input_grad[0],
            needs_lora=ctx.needs_input_grad[5:],
        )
        return (dx, None, None, None, None, *dlora)


def gradients(
    x: Tensor,
    weight: Tensor,
    parts: Sequence[LoraPart],
    scaling: float,
    grads: Sequence[Tensor | None],
    splits: Sequence[int] | None = None,
    *,
    needs_x: bool,
    needs_lora: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Of `replay_linear`'s x, and of every part's a and b in turn, for the gradients of its outputs; None where none is
    needed or there is none. Nothing else holds them.

    Args:
        needs_lora: of every part's a and b in turn.
    """
    splits = tuple(splits or (weight.shape[0],))
    starts = [sum(splits[:i]) for i in range(len(splits))]

    dx = None
    if needs_x and x.is_cuda and all(dy is not None for dy in grads):
        # One sum, rounded once; a product per output would round every partial sum.
        dx = (grads[0] if len(grads) == 1 else torch.cat(grads, dim=-1)) @ weight
    elif needs_x:
        for dy, start, width in zip(grads, starts, splits, strict=True):
            if dy is None:
                continue
            rows = weight[start : start + width]
            dx = matmul(dy, rows) if dx is None else dx.addmm_(dy, rows)

    dlora: list[Tensor | None] = [None] * (2 * len(parts))
    wanted = []
    for i, part in enumerate(parts):
        split = max(j for j, s in enumerate(starts) if s <= part.start)
        dy = grads[split]
        if dy is not None and (needs_x or needs_lora[2 * i] or needs_lora[2 * i + 1]):
            wanted.append((i, part, dy[:, part.start - starts[split] : part.end - starts[split]]))
    if not wanted:
        return dx, dlora

    # All adapters of one input share two thin products: x Aᵀ for dB, (dy B)ᵀ x for dA.
    if any(needs_lora[2 * i + 1] for i, _, _ in wanted):
        x_a = x @ torch.cat([part.a for _, part, _ in wanted]).T
        offset = 0
        for i, part, dy in wanted:
            rank = part.a.shape[0]
            own = x_a[:, offset : offset + rank]
            # (ownᵀ dy)ᵀ runs at twice the rate of dyᵀ own.
            dlora[2 * i + 1] = wide_mm(own.T, dy).mul_(scaling).T
            offset += rank
    for i, part, _ in wanted:
        if part.b_is_zero and needs_lora[2 * i]:
            dlora[2 * i] = torch.zeros_like(part.a)
    live = [(i, part, dy) for i, part, dy in wanted if not part.b_is_zero]
    if live:
        d_xa = torch.cat([wide_mm(dy, part.b) for _, part, dy in live], dim=1)
        d_xa = d_xa.mul_(scaling).to(x.dtype)
        if dx is not None:
            dx.addmm_(d_xa, torch.cat([part.a for _, part, _ in live]))
        if any(needs_lora[2 * i] for i, _, _ in live):
            da = wide_mm(d_xa.T, x)
            offset = 0
            for i, part, _ in live:
                rank = part.a.shape[0]
                dlora[2 * i] = da[offset : offset + rank]
                offset += rank
    return dx, dlora
