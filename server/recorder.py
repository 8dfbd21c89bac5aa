"""Records activations of prefill tokens into the activation pool, from hooks on the model's submodules.

Per decoder layer five tensors pass by that the backward pass needs (see `protocol.layout`). Where SGLang's fused
kernels write into their inputs each is copied at once. Its native operations never do: there the tensors are kept, and
copied by `flush` when the batch's tokens have been sent, so that no first token waits for it. Decode batches are not
recorded: the modules have no hooks then.
A token that cannot be recorded is simply computed again by the trainer; nothing here can fail a request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from alchemist.protocol.layout import RowLayout
from alchemist.server.pool import ActivationPool

logger = logging.getLogger(__name__)

_Write = Callable[[torch.Tensor, torch.Tensor], None]
_Hook = Callable[..., None]


DEFER_BYTES = 64 << 20
"""Most that tensors kept for `flush` may take; the rest of a batch is copied at once."""


class Recorder:
    """Fills `pool` during the forward passes of one model runner."""

    def __init__(self, model: torch.nn.Module, layout: RowLayout, pool: ActivationPool) -> None:
        """Args:
        model: SGLang's causal LM; LoRA wrappers, if any, already in place.
        """
        self._pool = pool
        self._taps: list[_Tap] = []
        self._rows: torch.Tensor | slice = slice(0)
        self._count = 0
        self.num_recorded = 0
        self._may_defer = _is_functional(model.model.layers[0])
        self._kept: list[tuple[torch.Tensor, torch.Tensor | slice, torch.Tensor]] = []
        self._num_kept_bytes = 0
        q = layout.num_heads * layout.head_dim
        k = layout.num_kv_heads * layout.head_dim
        for index, layer in enumerate(model.model.layers):
            columns = {
                name: pool.data[index].narrow(1, offset, width)
                for name, (offset, width) in layout.fields.items()
            }
            write, attention = self._write, layer.self_attn
            self._taps += [
                _Tap(layer.input_layernorm._forward_hooks, _residual(write, columns["x"])),
                _Tap(
                    layer.post_attention_layernorm._forward_hooks, _residual(write, columns["mid"])
                ),
                _Tap(
                    attention.qkv_proj._forward_hooks,
                    _qkv(write, columns["q"], columns.get("k"), q, k),
                ),
                _Tap(attention.o_proj._forward_pre_hooks, _input(write, columns["attn"])),
                _Tap(layer.mlp.gate_up_proj._forward_hooks, _output(write, columns["gate_up"])),
            ]

    def begin(self, slots: torch.Tensor) -> None:
        """A prefill forward starts; its token i writes K/V slot `slots[i]`."""
        # Rows may change hands now.
        self.flush()
        try:
            rows = self._pool.alloc(slots)
        except Exception:
            logger.exception("activation pool: allocation failed; this batch is not recorded")
            rows = None
        if rows is None or not rows.numel():
            return
        self._count = rows.numel()
        first = int(rows[0])
        # A run of neighbouring rows is one plain copy, several times faster than a scatter.
        is_run = bool((rows.diff() == 1).all())
        self._rows = slice(first, first + self._count) if is_run else rows
        self.num_recorded += self._count
        for tap in self._taps:
            tap.hooks[id(tap)] = tap.hook

    def end(self) -> None:
        for tap in self._taps:
            tap.hooks.pop(id(tap), None)

    def _write(self, column: torch.Tensor, value: torch.Tensor) -> None:
        """Copy [≥ n, width] activations of this batch's tokens into a column of the pool."""
        rows, value = self._rows, value[: self._count]
        size = value.numel() * value.element_size()
        if self._may_defer and self._num_kept_bytes + size <= DEFER_BYTES:
            self._kept.append((column, rows, value))
            self._num_kept_bytes += size
        else:
            _copy(column, rows, value)

    def flush(self) -> None:
        """Copy what was kept. To be called before anybody is told of the rows, and once a loop of the scheduler.

        A row may have ended since: then its generation has changed, and nobody reads what is copied into it.
        """
        for column, rows, value in self._kept:
            _copy(column, rows, value)
        self._kept.clear()
        self._num_kept_bytes = 0


class _Tap(NamedTuple):
    """A hook that is in its module's table only while a batch is recorded: torch calls a module with hooks by a slower
    way, and a small model's decode step has some twenty of them.
    """

    hooks: dict[int, _Hook]
    hook: _Hook


def _copy(column: torch.Tensor, rows: torch.Tensor | slice, value: torch.Tensor) -> None:
    if isinstance(rows, slice):
        column[rows].copy_(value)
    else:
        column.index_copy_(0, rows, value)


def _is_functional(layer: torch.nn.Module) -> bool:
    """Whether none of the layer's operations writes into its input."""
    attention = layer.self_attn
    operations = (
        layer.input_layernorm,
        layer.post_attention_layernorm,
        attention.rotary_emb,
        layer.mlp.act_fn,
    )
    return all(o._forward_method == o.forward_native for o in operations)


def _residual(write: _Write, column: torch.Tensor) -> _Hook:
    def hook(module: Any, args: Any, output: Any) -> None:
        # norm(x) → normed, at the bottom of the stack; norm(y, residual) → (normed, y + residual) above.
        write(column, output[1] if isinstance(output, tuple) else args[0])

    return hook


def _qkv(
    write: _Write, q_column: torch.Tensor, k_column: torch.Tensor | None, q: int, k: int
) -> _Hook:
    def hook(module: Any, args: Any, output: Any) -> None:
        write(q_column, output[0][:, :q])
        if k_column is not None:
            write(k_column, output[0][:, q : q + k])

    return hook


def _input(write: _Write, column: torch.Tensor) -> _Hook:
    def hook(module: Any, args: Any) -> None:
        write(column, args[0])

    return hook


def _output(write: _Write, column: torch.Tensor) -> _Hook:
    def hook(module: Any, args: Any, output: Any) -> None:
        write(column, output[0])

    return hook
