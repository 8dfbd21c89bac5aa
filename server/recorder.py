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
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from alchemist.protocol.layout import RowLayout
from alchemist.server.pool import ActivationPool

logger = logging.getLogger(__name__)

_Write = Callable[[str, torch.Tensor], None]
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
        self._rows = np.arange(0)
        self._gens = self._rows
        self.num_recorded = 0
        self._may_defer = _is_functional(model.model.layers[0])
        self._kept: list[tuple[int, str, torch.Tensor]] = []
        self._num_kept_bytes = 0
        q = layout.num_heads * layout.head_dim
        k = layout.num_kv_heads * layout.head_dim if layout.has_qk_norm else 0
        for index, layer in enumerate(model.model.layers):
            write, attention = partial(self._write, index), layer.self_attn
            self._taps += [
                _Tap(layer.input_layernorm._forward_hooks, _residual(write, "x")),
                _Tap(layer.post_attention_layernorm._forward_hooks, _residual(write, "mid")),
                _Tap(attention.qkv_proj._forward_hooks, _qkv(write, q, k)),
                _Tap(attention.o_proj._forward_pre_hooks, _input(write, "attn")),
                _Tap(layer.mlp.gate_up_proj._forward_hooks, _output(write, "gate_up")),
            ]

    def begin(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """A prefill forward starts; its token i is at `positions[i]` and writes K/V slot `slots[i]`."""
        # Rows may change hands now.
        self.flush()
        try:
            rows = self._pool.record(slots, positions)
        except Exception:
            logger.exception("activation pool: no rows for this batch; it is not recorded")
            return
        if not rows.size:
            return
        self._rows, self._gens = rows, self._pool.gens[rows]
        self.num_recorded += rows.size
        for tap in self._taps:
            tap.hooks[id(tap)] = tap.hook

    def end(self) -> None:
        for tap in self._taps:
            tap.hooks.pop(id(tap), None)

    def _write(self, layer: int, field: str, value: torch.Tensor) -> None:
        """Store [≥ n, width] activations of this batch's first n tokens."""
        value = value[: self._rows.size]
        size = value.numel() * value.element_size()
        if self._may_defer and self._num_kept_bytes + size <= DEFER_BYTES:
            self._kept.append((layer, field, value))
            self._num_kept_bytes += size
        else:
            self._pool.device.write(layer, field, self._rows, value)

    def flush(self) -> None:
        """Copy what was kept. To be called before anybody is told of the rows, and once a loop of the scheduler.

        Rows may have ended since, and their slots may be serving's again: those are not touched.
        """
        if not self._kept:
            return
        still = self._pool.still(self._rows, self._gens)
        rows = self._rows[still]
        which = None if still.all() else torch.from_numpy(still)
        for layer, field, value in self._kept if rows.size else ():
            self._pool.device.write(layer, field, rows, value if which is None else value[which])
        self._kept.clear()
        self._num_kept_bytes = 0


class _Tap(NamedTuple):
    """A hook that is in its module's table only while a batch is recorded: torch calls a module with hooks by a slower
    way, and a small model's decode step has some twenty of them.
    """

    hooks: dict[int, _Hook]
    hook: _Hook


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


def _residual(write: _Write, field: str) -> _Hook:
    def hook(module: Any, args: Any, output: Any) -> None:
        # norm(x) → normed, at the bottom of the stack; norm(y, residual) → (normed, y + residual) above.
        write(field, output[1] if isinstance(output, tuple) else args[0])

    return hook


def _qkv(write: _Write, q: int, k: int) -> _Hook:
    def hook(module: Any, args: Any, output: Any) -> None:
        write("q", output[0][:, :q])
        if k:
            write("k", output[0][:, q : q + k])

    return hook


def _input(write: _Write, field: str) -> _Hook:
    def hook(module: Any, args: Any) -> None:
        write(field, args[0])

    return hook


def _output(write: _Write, field: str) -> _Hook:
    def hook(module: Any, args: Any, output: Any) -> None:
        write(field, output[0])

    return hook
