"""Records activations of prefill tokens, and if asked of decoded ones, from hooks on the model's submodules.

Per decoder layer five tensors pass by that the backward pass needs (see `protocol.layout`). Where SGLang's fused
kernels write into their inputs each is copied at once. Its native operations never do: there the tensors are kept, and
copied by `flush` when the batch's tokens have been sent, so that no first token waits for it; those of decode steps
together, when the request has ended.
Modules have no hooks in a batch that is not recorded.
A token that cannot be recorded is simply computed again by the trainer. What goes wrong here is raised by `begin`,
`end` and `flush`, never in the middle of a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from alchemist.protocol.layout import RowLayout
from alchemist.server.pool import ActivationPool

_Write = Callable[[str, torch.Tensor], None]
_Hook = Callable[..., None]


DEFER_BYTES = 96 << 20
"""Most that tensors kept for `flush` may take; a batch beyond it is copied at once."""


class Recorder:
    """Fills `pool` during the forward passes of one model runner."""

    def __init__(self, model: torch.nn.Module, layout: RowLayout, pool: ActivationPool) -> None:
        """Args:
        model: SGLang's causal LM; LoRA wrappers, if any, already in place.
        """
        self._pool = pool
        self._taps = taps_of(model, layout, lambda layer: partial(self._write, layer))
        self._batch = _Batch(np.arange(0), np.arange(0), slice(0), False, [])
        """The one that is being computed."""
        self.num_recorded = 0
        self._may_defer = _is_functional(model.model.layers[0])
        # What is kept is as the model has it.
        self._token_bytes = msgspec.structs.replace(layout, activation_dtype="auto").row_bytes
        self._kept: list[_Batch] = []
        self._num_kept_bytes = 0
        self._error: Exception | None = None
        """Of this batch."""

    def begin(
        self,
        slots: torch.Tensor,
        positions: torch.Tensor,
        which: torch.Tensor | None = None,
        *,
        is_decode: bool = False,
    ) -> bool:
        """A forward starts; its token i is at `positions[i]` and writes K/V slot `slots[i]`. Whether any is recorded.

        Args:
            which: int64, ascending: the tokens to be recorded; None: all.
            is_decode: nothing follows from it here.
        """
        if which is not None:
            slots, positions = slots[which], positions[which]
        rows = self._pool.record(slots, positions)
        count = rows.size
        if not count:
            return False
        tokens = slice(count) if which is None else which[:count]
        size = self._token_bytes * (count if which is None else int(which[-1]) + 1)
        if self._num_kept_bytes + size > DEFER_BYTES:
            self.flush()
        defer = self._may_defer and self._num_kept_bytes + size <= DEFER_BYTES
        self._batch = _Batch(rows, self._pool.gens[rows], tokens, defer, [])
        if defer:
            self._kept.append(self._batch)
            self._num_kept_bytes += size
        self.num_recorded += count
        for tap in self._taps:
            tap.hooks[id(tap)] = tap.hook
        return True

    def end(self) -> None:
        """The forward is done."""
        self.release()
        if self._error is not None:
            raise self._error
        if not self._batch.is_deferred:
            self._pool.complete(self._batch.rows)

    def release(self) -> None:
        """Leave the model as if nobody recorded."""
        for tap in self._taps:
            tap.hooks.pop(id(tap), None)

    def _write(self, layer: int, field: str, value: torch.Tensor) -> None:
        """Store [tokens, width] activations of this batch."""
        batch = self._batch
        if batch.is_deferred:
            batch.values.append(((layer, field), value))
        elif self._error is None:
            try:
                self._pool.write(layer, field, batch.rows, value[batch.tokens])
            except Exception as error:
                # Whatever it is: the model is computing somebody's answer. `end` raises it.
                self._error = error

    def flush(self) -> None:
        """Copy what was kept. To be called before rows are read or copied to the host, and after each prefill: memory
        that is kept for longer is not there for the next one, which then waits for fresh pages.

        Rows may have ended since, and their slots may be serving's again: those are not touched.
        """
        rows: list[np.ndarray] = []
        values: dict[tuple[int, str], list[torch.Tensor]] = {}
        for batch in self._kept:
            still = self._pool.still(batch.rows, batch.gens)
            if not still.any():
                continue
            rows.append(batch.rows[still])
            for place, value in batch.values:
                mine = value[batch.tokens]
                values.setdefault(place, []).append(
                    mine if still.all() else mine[torch.from_numpy(still)]
                )
        self._kept.clear()
        self._num_kept_bytes = 0
        if not rows:
            return
        every, order = np.concatenate(rows), None
        if len(rows) > 1:
            # The pool takes rows on the device before rows on the host.
            by_place = np.argsort(every)
            every, order = every[by_place], torch.from_numpy(by_place)
        for (layer, field), parts in values.items():
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            self._pool.write(layer, field, every, whole if order is None else whole[order])
        self._pool.complete(every)


class _Batch(NamedTuple):
    """Tokens that are recorded in one forward pass, and what was kept of them."""

    rows: np.ndarray
    gens: np.ndarray
    """The rows' generations when the pass began."""
    tokens: torch.Tensor | slice
    """Which of the pass's tokens have the rows."""
    is_deferred: bool
    values: list[tuple[tuple[int, str], torch.Tensor]]
    """((layer, field), [tokens of the pass, width])."""


class Tap(NamedTuple):
    """A hook that is in its module's table only while a batch is recorded: torch calls a module with hooks by a slower
    way, and a small model's decode step has some twenty of them.
    """

    hooks: dict[int, _Hook]
    hook: _Hook


def taps_of(
    model: torch.nn.Module, layout: RowLayout, write_of: Callable[[int], _Write]
) -> list[Tap]:
    """Hooks that pass each layer's activations on, in the order in which they come: x, q, k, attn, mid, gate_up.

    Args:
        model: SGLang's causal LM; LoRA wrappers, if any, already in place.
        write_of: of a layer's number: what is called with each of its fields' names and tensors [tokens, width].
    """
    taps: list[Tap] = []
    q = layout.num_heads * layout.head_dim
    k = layout.num_kv_heads * layout.head_dim if layout.has_qk_norm else 0
    for index, layer in enumerate(model.model.layers):
        write, attention = write_of(index), layer.self_attn
        taps += [
            Tap(layer.input_layernorm._forward_hooks, _residual(write, "x")),
            Tap(layer.post_attention_layernorm._forward_hooks, _residual(write, "mid")),
            Tap(attention.qkv_proj._forward_hooks, _qkv(write, q, k)),
            Tap(attention.o_proj._forward_pre_hooks, _input(write, "attn")),
            Tap(layer.mlp.gate_up_proj._forward_hooks, _output(write, "gate_up")),
        ]
    return taps


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
