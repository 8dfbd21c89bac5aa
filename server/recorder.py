"""Records activations of prefill tokens, and if asked of decoded ones, as they pass the model's submodules.

Per decoder layer five tensors pass by that the backward pass needs (see `protocol.layout`). Where SGLang's fused
kernels write into their inputs each is copied at once. Its native operations never do: there the tensors are kept, and
copied a layer at a time when nobody waits (`flush_some`), so that no token waits for it; or when there are too many
(`relieve`), or somebody asks for rows (`flush`). While requests run copying has a share of the time and no more: what
finds no room until then is not recorded. Rows, too, are begun later, and those of decode steps together; they are also
copied together.
Modules are as they were in a batch that is not recorded.
A token that cannot be recorded is simply computed again by the trainer. What goes wrong here is raised by `begin`,
`end` and the three that copy, never in the middle of a forward pass.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch

from alchemist.protocol.layout import RowLayout
from alchemist.server.pool import ActivationPool, Begun

_Write = Callable[[str, torch.Tensor], None]
_Note = Callable[[Any, Any], None]
_Forward = Callable[..., Any]


KEEP_BYTES = 256 << 20
"""Most that tensors kept for later may take; a batch beyond it is copied at once. `relieve` halves it, so that there is
room for the next prefill: by the embedded model's 40 kB a token those are 3000 tokens that came without a pause.
"""
SAVED_S = 0.02
"""Most of the share's time that is saved for later: a few layers' worth."""
DECODE_BYTES = 4 << 20
"""Of decode steps copied together, about: what takes a millisecond."""


class Recorder:
    """Fills `pool` during the forward passes of one model runner."""

    def __init__(
        self,
        model: torch.nn.Module,
        layout: RowLayout,
        pool: ActivationPool,
        *,
        busy_share: float = 1.0,
    ) -> None:
        """Args:
        model: SGLang's causal LM; LoRA wrappers, if any, already in place.
        busy_share: of the time in which requests run, what copying may take; 1: what it needs.
        """
        self._busy_share = busy_share
        self._allowed_s, self._relieved = 0.0, time.monotonic()
        self._pool = pool
        self._taps = taps_of(model, layout, lambda layer: partial(self._write, layer))
        self._batch = _Batch(Begun(), slice(0))
        """The one that is being computed."""
        self._may_defer = _is_functional(model.model.layers[0])
        # What is kept is as the model has it.
        self._token_bytes = msgspec.structs.replace(layout, activation_dtype="auto").row_bytes
        self._kept: deque[_Batch] = deque()
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
            which: int64, ascending: the tokens to be recorded; None: all. Of a pass for which there is no room now none
                are.
            is_decode: there are few tokens, and more will come.
        """
        size = self._token_bytes * slots.numel()
        if which is not None:
            slots, positions = slots[which], positions[which]
        defer = self._may_defer and size <= KEEP_BYTES
        if self._num_kept_bytes + size > KEEP_BYTES:
            if defer and self._busy_share < 1:
                self._pool.num_skipped += slots.numel()
                return False
            self.flush()
        if defer:
            # Beginning rows takes a millisecond of NumPy calls, which need not be somebody's first token's.
            begun = self._pool.record_later(slots, positions)
        else:
            rows = self._pool.record(slots, positions)
            if not rows.size:
                return False
            begun = Begun(rows, self._pool.gens[rows])
        tokens = slice(None) if which is None else which
        self._batch = _Batch(begun, tokens, is_decode, size if defer else 0)
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
        if not self._batch.num_bytes:
            self._pool.complete(self._batch.begun.rows)

    def release(self) -> None:
        """Leave the model as if nobody recorded."""
        for tap in self._taps:
            tap.remove()

    def _write(self, layer: int, field: str, value: torch.Tensor) -> None:
        """Store [tokens, width] activations of this batch."""
        batch = self._batch
        if batch.num_bytes:
            batch.values.append(((layer, field), value))
        elif self._error is None:
            try:
                self._pool.write(layer, field, batch.begun.rows, batch.of_rows(value))
            except Exception as error:
                # Whatever it is: the model is computing somebody's answer. `end` raises it.
                self._error = error

    def relieve(self) -> None:
        """Copy what is too much to be kept until nobody waits, as far as there is time for it. To be called when a
        batch's tokens have been sent.
        """
        last, self._relieved = self._relieved, time.monotonic()
        earned = self._busy_share * (self._relieved - last)
        self._allowed_s = min(SAVED_S, self._allowed_s + earned)
        while self._num_kept_bytes > KEEP_BYTES // 2 and (
            self._busy_share >= 1 or self._allowed_s > 0
        ):
            started = time.monotonic()
            self.flush_some()
            self._allowed_s -= time.monotonic() - started

    def flush(self) -> None:
        """Copy all that was kept. To be called before rows are read or copied to the host."""
        while self.flush_some():
            pass

    def flush_some(self) -> bool:
        """Copy a layer of the oldest batch, or decode steps in a row, which are small; whether anything was kept.

        Rows may have ended since, and their slots may be serving's again: those are not touched.
        """
        if not self._kept:
            return False
        self._pool.begin_waiting()
        oldest = self._kept[0]
        if oldest.is_decode:
            batches = list(itertools.takewhile(lambda batch: batch.is_decode, self._kept))
            batches = batches[: max(1, DECODE_BYTES // oldest.num_bytes)]
            values = [batch.values for batch in batches]
        else:
            batches, values = [oldest], [oldest.next_layer()]
        written = self._copy(batches, values)
        if oldest.is_decode or not oldest.values or not written.size:
            self._pool.complete(written)
            for batch in batches:
                self._kept.popleft()
                self._num_kept_bytes -= batch.num_bytes
                # The latest one is held until the next begins, and its rows may have ended.
                batch.values.clear()
        return True

    def _copy(self, batches: list[_Batch], values: list[list[_Value]]) -> np.ndarray:
        """Write `values` of each batch in the rows that are still its own; these."""
        rows: list[np.ndarray] = []
        by_place: dict[tuple[int, str], list[torch.Tensor]] = {}
        for batch, own in zip(batches, values, strict=True):
            still = self._pool.still(batch.begun.rows, batch.begun.gens)
            rows.append(batch.begun.rows[still])
            for place, value in own:
                mine = batch.of_rows(value)
                by_place.setdefault(place, []).append(
                    mine if still.all() else mine[torch.from_numpy(still)]
                )
        every, order = np.concatenate(rows), None
        if not every.size:
            return every
        if len(rows) > 1:
            # The pool takes rows on the device before rows on the host.
            ascending = np.argsort(every)
            every, order = every[ascending], torch.from_numpy(ascending)
        for (layer, field), parts in by_place.items():
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            self._pool.write(layer, field, every, whole if order is None else whole[order])
        return every


_Value = tuple[tuple[int, str], torch.Tensor]
"""((layer, field), [tokens of the pass, width])."""


class _Batch:
    """Tokens that are recorded in one forward pass, and what was kept of them."""

    def __init__(
        self,
        begun: Begun,
        tokens: torch.Tensor | slice,
        is_decode: bool = False,
        num_bytes: int = 0,
    ) -> None:
        """Args:
        tokens: which of the pass's are to be recorded.
        num_bytes: that are kept of it; 0: it is copied at once.
        """
        self.begun, self._tokens = begun, tokens
        self.is_decode, self.num_bytes = is_decode, num_bytes
        self.values: list[_Value] = []

    def of_rows(self, value: torch.Tensor) -> torch.Tensor:
        """Of [tokens of the pass, width] those that have a row."""
        return value[self._tokens][: self.begun.rows.size]

    def next_layer(self) -> list[_Value]:
        """The first layer's values, which are kept no longer."""
        layer = self.values[0][0][0]
        count = sum(at == layer for (at, _), _ in self.values)
        taken, self.values = self.values[:count], self.values[count:]
        return taken


class Tap:
    """Passes on what goes by a module, in the place of its `forward` only while a batch is recorded. Not a hook: torch
    calls a module that has one by a slower way, and a small model's decode step has some twenty of them.
    """

    def __init__(self, module: torch.nn.Module, note: _Note, *, is_before: bool = False) -> None:
        """Args:
        note: called with the module's arguments and its output.
        is_before: it is called before there is an output, with None.
        """
        self._attributes, self._note = vars(module), note
        self._own = module.forward
        self._forward = self._before if is_before else self._after
        self._inner: _Forward | None = None
        """What had the place; None: nothing, or the tap is not installed."""

    def install(self) -> None:
        found = self._attributes.get("forward")
        if found is not self._forward:
            self._inner = found
            self._attributes["forward"] = self._forward

    def remove(self) -> None:
        if self._attributes.get("forward") is not self._forward:
            return
        inner, self._inner = self._inner, None
        if inner is None:
            del self._attributes["forward"]
        else:
            self._attributes["forward"] = inner

    def _before(self, *args: Any, **kwargs: Any) -> Any:
        self._note(args, None)
        return (self._inner or self._own)(*args, **kwargs)

    def _after(self, *args: Any, **kwargs: Any) -> Any:
        output = (self._inner or self._own)(*args, **kwargs)
        self._note(args, output)
        return output


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
            Tap(layer.input_layernorm, _residual(write, "x")),
            Tap(layer.post_attention_layernorm, _residual(write, "mid")),
            Tap(attention.qkv_proj, _qkv(write, q, k)),
            Tap(attention.o_proj, _input(write, "attn"), is_before=True),
            Tap(layer.mlp.gate_up_proj, _output(write, "gate_up")),
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
