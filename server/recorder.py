"""Records activations of prefill tokens, and if asked of decoded ones, as they pass the model's submodules.

Per decoder layer five tensors pass by that the backward pass needs (see `protocol.layout`). Where SGLang's fused
kernels write into their inputs each is copied at once. Its native operations never do: there the tensors are kept, and
copied by `flush` when the batch's tokens have been sent, so that no first token waits for it; those of decode steps
together, when the request has ended, and their rows are begun together, too.
Modules are as they were in a batch that is not recorded.
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
from alchemist.server.pool import ActivationPool, Begun

_Write = Callable[[str, torch.Tensor], None]
_Note = Callable[[Any, Any], None]


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
        self._batch = _Batch(Begun(), slice(0), False, [])
        """The one that is being computed."""
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
            is_decode: there are few tokens, and more will come.
        """
        size = self._token_bytes * slots.numel()
        if which is not None:
            slots, positions = slots[which], positions[which]
        if self._num_kept_bytes + size > DEFER_BYTES:
            self.flush()
        defer = self._may_defer and self._num_kept_bytes + size <= DEFER_BYTES
        if defer and is_decode:
            begun = self._pool.record_later(slots, positions)
        else:
            rows = self._pool.record(slots, positions)
            if not rows.size:
                return False
            begun = Begun(rows, self._pool.gens[rows])
        self._batch = _Batch(begun, slice(None) if which is None else which, defer, [])
        if defer:
            self._kept.append(self._batch)
            self._num_kept_bytes += size
        for tap in self._taps:
            tap.install()
        return True

    def end(self) -> None:
        """The forward is done."""
        self.release()
        if self._error is not None:
            raise self._error
        if not self._batch.is_deferred:
            self._pool.complete(self._batch.begun.rows)

    def release(self) -> None:
        """Leave the model as if nobody recorded."""
        for tap in self._taps:
            tap.remove()

    def _write(self, layer: int, field: str, value: torch.Tensor) -> None:
        """Store [tokens, width] activations of this batch."""
        batch = self._batch
        if batch.is_deferred:
            batch.values.append(((layer, field), value))
        elif self._error is None:
            try:
                self._pool.write(layer, field, batch.begun.rows, batch.of_rows(value))
            except Exception as error:
                # Whatever it is: the model is computing somebody's answer. `end` raises it.
                self._error = error

    def flush(self) -> None:
        """Copy what was kept. To be called before rows are read or copied to the host, and after each prefill: memory
        that is kept for longer is not there for the next one, which then waits for fresh pages.

        Rows may have ended since, and their slots may be serving's again: those are not touched.
        """
        self._pool.begin_waiting()
        rows: list[np.ndarray] = []
        values: dict[tuple[int, str], list[torch.Tensor]] = {}
        for batch in self._kept:
            still = self._pool.still(batch.begun.rows, batch.begun.gens)
            if not still.any():
                continue
            rows.append(batch.begun.rows[still])
            for place, value in batch.values:
                mine = batch.of_rows(value)
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

    begun: Begun
    tokens: torch.Tensor | slice
    """Which of the pass's tokens are to be recorded."""
    is_deferred: bool
    values: list[tuple[tuple[int, str], torch.Tensor]]
    """((layer, field), [tokens of the pass, width])."""

    def of_rows(self, value: torch.Tensor) -> torch.Tensor:
        """Of [tokens of the pass, width] those that have a row."""
        return value[self.tokens][: self.begun.rows.size]


class Tap(NamedTuple):
    """A module's `forward` that passes something on, in the module's place of it only while a batch is recorded. Not a
    hook: torch calls a module that has one by a slower way, and a small model's decode step has some twenty of them.
    """

    module: torch.nn.Module
    forward: Callable[..., Any]

    def install(self) -> None:
        self.module.__dict__["forward"] = self.forward

    def remove(self) -> None:
        self.module.__dict__.pop("forward", None)


def taps_of(
    model: torch.nn.Module, layout: RowLayout, write_of: Callable[[int], _Write]
) -> list[Tap]:
    """What passes each layer's activations on, in the order in which they come: x, q, k, attn, mid, gate_up.

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
            _tap(layer.input_layernorm, _residual(write, "x")),
            _tap(layer.post_attention_layernorm, _residual(write, "mid")),
            _tap(attention.qkv_proj, _qkv(write, q, k)),
            _tap(attention.o_proj, _input(write, "attn"), is_before=True),
            _tap(layer.mlp.gate_up_proj, _output(write, "gate_up")),
        ]
    return taps


def _tap(module: torch.nn.Module, note: _Note, *, is_before: bool = False) -> Tap:
    original = module.forward

    def before(*args: Any, **kwargs: Any) -> Any:
        note(args, None)
        return original(*args, **kwargs)

    def after(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        note(args, output)
        return output

    return Tap(module, before if is_before else after)


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


def _residual(write: _Write, field: str) -> _Note:
    def note(args: Any, output: Any) -> None:
        # norm(x) → normed, at the bottom of the stack; norm(y, residual) → (normed, y + residual) above.
        write(field, output[1] if isinstance(output, tuple) else args[0])

    return note


def _qkv(write: _Write, q: int, k: int) -> _Note:
    def note(args: Any, output: Any) -> None:
        write("q", output[0][:, :q])
        if k:
            write("k", output[0][:, q : q + k])

    return note


def _input(write: _Write, field: str) -> _Note:
    def note(args: Any, output: Any) -> None:
        write(field, args[0])

    return note


def _output(write: _Write, field: str) -> _Note:
    def note(args: Any, output: Any) -> None:
        write(field, output[0])

    return note
