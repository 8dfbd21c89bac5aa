"""Replay: a forward pass that computes only what was not recorded, and the backward pass over
everything.

Forward, layer by layer, without a graph: missing tokens only; their queries attend over recorded
keys and values (KV pool) and their own. Backward, layer by layer from the last: fetch that layer's
rows, rebuild the graph of the one layer function on recorded values, differentiate it, hand the
hidden-state gradient down, release. At no time is more than one layer's graph in memory. `gate()`
is called at every layer boundary in both directions, on a CPU also between a layer's operations, and
may block.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from alchemist.kernels.gated_mlp import no_pause
from alchemist.kernels.linear_logprob import (
    LinearLogprob,
    linear_logprob,
    linear_logprob_backward,
)
from alchemist.kernels.path_attention import PathBlock, paged, path_attention
from alchemist.kernels.rms_norm import add_rms_norm, rms_norm

from .batch import TokenBatch
from .layer import LayerLora, LayerValues, decoder_layer, mlp_input, mlp_output, pauses
from .lora import LoraAdapter
from .rows import ActivationView
from .weights import BaseWeights

Gate = Callable[[], None]

ATTEND_IN_POOL = False
"""Whether on a GPU missing tokens attend to recorded keys and values where those lie in the KV pool
(`kernels.path_attention.paged`, with FlashInfer), or to copies of them. Off until it has been measured on one. Where
the pool or the plan does not allow it, copies are made all the same.
"""


@runtime_checkable
class PooledView(Protocol):
    """A view whose keys and values may be read in place: `gpu_rows.GpuView`."""

    def in_pool(self, rows: Tensor) -> Tensor: ...

    def pool(self, layer: int) -> tuple[Tensor, Tensor]: ...


class _InPool(NamedTuple):
    """How a batch's recorded keys are read in place."""

    view: PooledView
    kernels: paged.Kernels
    plan: paged.PagedPlan
    last_plan: paged.PagedPlan
    rows: Tensor
    """Those that have to be copied: they are on the host."""
    slots: Tensor


@dataclass
class ForwardState:
    """What a forward leaves for the loss and the backward of one batch."""

    logps: list[Tensor]
    """Per sequence [response tokens]."""
    kept: list[LayerValues]
    """Per layer, the values of the missing tokens that will be differentiated."""
    head_hidden: Tensor
    """[loss heads, H] last layer's output, before the final norm."""
    pairs: tuple[Tensor, Tensor, Tensor] | None = None
    """(rows, targets, order) of the loss heads' log-probabilities."""
    lm_head: LinearLogprob | None = None


class Phases:
    """Seconds by phase. A phase inside another is taken out of it. On a GPU a phase is as long as the device took for
    it, and nothing waits for the device before `seconds` is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._done: list[tuple[str, str | None, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        start = self._now()
        try:
            yield
        finally:
            self._open.pop()
            self._done.append((name, outer, start, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        if self._cuda and self._done:
            torch.cuda.synchronize()
        for name, outer, start, end in self._done:
            elapsed = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            self._seconds[name] += elapsed
            if outer is not None:
                self._seconds[outer] -= elapsed
        self._done.clear()
        return self._seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Replay:
    """Forward and backward of one `TokenBatch` at one adapter over borrowed weights and rows."""

    def __init__(
        self, weights: BaseWeights, view: ActivationView | None, gate: Gate, phases: Phases
    ) -> None:
        self._w, self._shape, self._view = weights, weights.shape, view
        self._gate, self._phases = gate, phases
        # What a GPU has been given cannot be taken back: there the bound is in layers.
        self._pause = no_pause if weights.device.type == "cuda" else pauses(gate)
        self._buffers: dict[str, Tensor] = {}
        # SGLang keeps its rotary tables in float32 on a GPU, and in the model's dtype elsewhere.
        narrow_on_gpu = weights.device.type == "cuda" and weights.dtype.itemsize < 4
        self._table_dtype = torch.float32 if narrow_on_gpu else weights.dtype

    def forward(
        self, batch: TokenBatch, adapter: LoraAdapter | None, *, gradient: bool
    ) -> ForwardState:
        """Log-probabilities of every sequence of the batch; with `gradient`, also what `backward`
        needs.

        Raises:
            RowsRevoked: a recorded row was taken away.
        """
        shape, weights, num_layers = self._shape, self._w, self._shape.num_layers
        first = batch.num_recorded
        cos_sin = shape.cos_sin(batch.positions[first:], self._table_dtype)
        x = weights.embed[batch.ids[first:]]
        out = x
        kept: list[LayerValues] = []
        num_kept = batch.num_differentiated - first
        in_pool = self._in_pool(batch)
        with torch.no_grad():
            for index in range(num_layers if x.shape[0] else 0):
                self._gate()
                last = index == num_layers - 1
                attend = self._attend(batch, index, last, in_pool)
                mid, down, values = decoder_layer(
                    x,
                    weights.layers[index],
                    shape,
                    LayerLora.of(adapter, index, shape),
                    cos_sin,
                    attend,
                    queries=batch.missing_heads if last else None,
                    keep=gradient,
                    pause=self._pause,
                )
                x = out = mid + down
                if gradient:
                    kept.append(_keep(values, num_kept, batch if last else None))
                # Released before the next layer computes its own.
                del mid, down, values
            hidden = self._head_hidden(batch, out, adapter)
            state = self._log_probabilities(batch, hidden, kept, gradient)
        self._confirm(batch)
        return state

    def backward(
        self,
        batch: TokenBatch,
        state: ForwardState,
        adapter: LoraAdapter,
        d_logps: Sequence[Tensor],
        grads: dict[str, Tensor],
    ) -> None:
        """Add the adapter's gradient to `grads` (PEFT names, float32 or wider) for the gradient
        `d_logps` of the first sequences' log-probabilities. Consumes `state.kept`, a layer at a
        time.

        Raises:
            RowsRevoked: a recorded row was taken away; `grads` may then hold part of this batch.
        """
        shape, num_layers = self._shape, self._shape.num_layers
        d_out = self._head_backward(batch, state, d_logps)
        b_is_zero = adapter.is_zero
        plan = batch.backward_plan()
        tables = shape.cos_sin(batch.positions[: batch.num_differentiated], self._table_dtype)
        for index in range(num_layers - 1, -1, -1):
            self._gate()
            if batch.num_recorded and self._view is not None:
                self._view.prefetch(index, batch.rows)
            layer_plan = batch.last_backward_plan() if index == num_layers - 1 else plan
            leaves = {
                name: tensor.detach().requires_grad_()
                for name, tensor in _layer_weights(adapter, index).items()
            }
            for name, leaf in leaves.items():
                # Of a 16-bit adapter, too: its sums over tokens are wide, and stay so.
                leaf.grad_dtype = grads[name].dtype
            lora = LayerLora.of(
                LoraAdapter(adapter.config, leaves), index, shape, b_is_zero=b_is_zero
            )
            found, d_out = self._layer_backward(
                batch, index, state.kept, lora, list(leaves.values()), tables, layer_plan, d_out
            )
            for name, grad in zip(leaves, found, strict=True):
                if grad is not None:
                    grads[name].add_(grad)
        self._confirm(batch)

    def _layer_backward(
        self,
        batch: TokenBatch,
        index: int,
        kept: list[LayerValues],
        lora: LayerLora,
        leaves: list[Tensor],
        tables: tuple[Tensor, Tensor],
        plan: list[PathBlock],
        d_out: Tensor,
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """Gradients of `leaves` and of the layer's input (of the first layer: `d_out` again).

        A function of its own, so that the layer's values are released before the next one's are fetched.
        """
        last = index == self._shape.num_layers - 1
        queries = batch.heads[: batch.num_loss_heads] if last else None
        recorded = self._recorded(batch, index, kept, queries)
        x = recorded.x.requires_grad_(index > 0)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return path_attention(q, k, v, plan, recorded=recorded.attn.unflatten(-1, q.shape[1:]))

        with torch.enable_grad():
            mid, down, _ = decoder_layer(
                x,
                self._w.layers[index],
                self._shape,
                lora,
                tables,
                attend,
                queries=queries,
                recorded=recorded,
                pause=self._pause,
            )
        inputs = [*leaves, *([x] if index else [])]
        outputs = [t for t in (mid, down) if t.requires_grad]
        found = torch.autograd.grad(outputs, inputs, [d_out] * len(outputs), allow_unused=True)
        if index:
            d_out = found[-1]
            assert d_out is not None
        return found[: len(leaves)], d_out

    def _in_pool(self, batch: TokenBatch) -> _InPool | None:
        """None: recorded keys and values are copied."""
        view, n = self._view, batch.num_recorded
        if not (ATTEND_IN_POOL and 0 < n < batch.num_tokens and isinstance(view, PooledView)):
            return None
        kernels = paged.kernels(self._w.dtype, *view.pool(0))
        if kernels is None:
            return None
        pooled = view.in_pool(batch.rows)
        slots = torch.full((batch.num_tokens,), -1)
        slots[:n] = torch.where(pooled, batch.slots.cpu(), -1)
        plans = batch.forward_plan, batch.last_forward_plan
        plan, last_plan = (paged.split(whole, slots) for whole in plans)
        if not paged.is_worth(plan, plans[0]):
            return None
        (at,) = torch.where(~pooled)
        at = at.to(batch.rows.device)
        return _InPool(view, kernels, plan, last_plan, batch.rows[at], batch.slots[at])

    def _attend(
        self, batch: TokenBatch, layer: int, last: bool, in_pool: _InPool | None
    ) -> Callable[..., Tensor]:
        plan = batch.last_forward_plan if last else batch.forward_plan

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if batch.num_recorded:
                k, v = self._with_recorded(batch, layer, batch.rows, batch.slots, k, v)
            return path_attention(q, k, v, plan)

        def attend_in_pool(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert in_pool is not None
            if in_pool.rows.numel():
                k, v = self._with_recorded(batch, layer, in_pool.rows, in_pool.slots, k, v)
            part = in_pool.last_plan if last else in_pool.plan
            out = paged.attention(q, k, v, *in_pool.view.pool(layer), part, in_pool.kernels)
            # After what reads the pool, as after a copy: this is enqueued, and proved by `confirm`.
            self._check(batch)
            return out

        return attend if in_pool is None else attend_in_pool

    def _with_recorded(
        self, batch: TokenBatch, layer: int, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the recorded tokens `rows`, then those given."""
        assert self._view is not None
        n, total = rows.shape[0], rows.shape[0] + k.shape[0]
        keys, values = k.new_empty(total, *k.shape[1:]), v.new_empty(total, *v.shape[1:])
        with self._phases.phase("rows"):
            self._view.fetch_kv(layer, rows, slots, keys[:n], values[:n])
            self._check(batch)
        keys[n:], values[n:] = k, v
        return keys, values

    def _head_hidden(self, batch: TokenBatch, out: Tensor, adapter: LoraAdapter | None) -> Tensor:
        """[heads, H]: computed where missing, from the last layer's rows where recorded."""
        hidden = out.new_empty(batch.heads.shape[0], self._shape.hidden_size)
        if batch.missing_heads.numel():
            hidden[batch.missing_head_ranks] = out
        if batch.recorded_heads.numel():
            layer = self._shape.num_layers - 1
            rows = batch.rows[batch.recorded_heads]
            weights, lora = self._w.layers[layer], LayerLora.of(adapter, layer, self._shape)
            mid = self._fetch(layer, "mid", rows)
            assert self._view is not None
            if self._view.layout.is_encoded("gate_up"):
                # Log-probabilities are those that were served: what is rounded is for gradients only.
                gate_up = mlp_input(mid, weights, lora, self._shape.rms_norm_eps)
            else:
                gate_up = self._fetch(layer, "gate_up", rows)
            self._check(batch)
            hidden[batch.recorded_head_ranks] = mlp_output(mid, gate_up, weights, lora)
        return hidden

    def _log_probabilities(
        self, batch: TokenBatch, hidden: Tensor, kept: list[LayerValues], gradient: bool
    ) -> ForwardState:
        normed = rms_norm(hidden, self._w.norm, self._shape.rms_norm_eps)
        heads, targets = torch.cat(batch.span_heads), torch.cat(batch.targets)
        order = torch.argsort(heads, stable=True)
        rows, targets = heads[order], targets[order]
        n = batch.num_loss_heads if gradient else 0
        cut = int((rows < n).sum())
        head = self._w.lm_head
        loss = linear_logprob(normed[:n], head, rows[:cut], targets[:cut], gradient=True)
        rest = linear_logprob(normed[n:], head, rows[cut:] - n, targets[cut:], gradient=False)
        logps = torch.empty_like(torch.cat([loss.logps, rest.logps]))
        logps[order] = torch.cat([loss.logps, rest.logps])
        lengths = [span.numel() for span in batch.span_heads]
        return ForwardState(
            logps=list(logps.split(lengths)),
            kept=kept,
            head_hidden=hidden[:n],
            pairs=(rows[:cut], targets[:cut], order[:cut]),
            lm_head=loss,
        )

    def _head_backward(
        self, batch: TokenBatch, state: ForwardState, d_logps: Sequence[Tensor]
    ) -> Tensor:
        assert state.lm_head is not None
        assert state.pairs is not None
        rows, targets, order = state.pairs
        flat = torch.zeros(
            sum(s.numel() for s in batch.span_heads),
            dtype=state.lm_head.logps.dtype,
            device=rows.device,
        )
        given = torch.cat(list(d_logps))
        flat[: given.numel()] = given
        d_normed = linear_logprob_backward(
            state.lm_head, self._w.lm_head, rows, targets, flat[order]
        )
        with torch.enable_grad():
            hidden = state.head_hidden.detach().requires_grad_()
            _, normed = add_rms_norm(hidden, None, self._w.norm, self._shape.rms_norm_eps)
        (d_hidden,) = torch.autograd.grad(normed, hidden, d_normed)
        return d_hidden

    def _recorded(
        self, batch: TokenBatch, layer: int, kept: list[LayerValues], queries: Tensor | None
    ) -> LayerValues:
        """One layer's values of every differentiated token (of `queries` where those suffice)."""
        own = kept.pop() if kept else None
        n = batch.num_recorded
        if n == 0:
            assert own is not None
            return own
        with self._phases.phase("rows"):
            values = self._assemble(batch, layer, own, queries)
            self._check(batch)
        return values

    def _assemble(
        self, batch: TokenBatch, layer: int, own: LayerValues | None, queries: Tensor | None
    ) -> LayerValues:
        assert self._view is not None
        view = self._view
        n, total = batch.num_recorded, batch.num_differentiated

        def whole(field: str) -> Tensor:
            out = self._buffer(field, total, view.layout.widths[field])
            view.fetch(layer, field, batch.rows, out[:n])
            if own is not None:
                out[n:] = getattr(own, field)
            return out

        if queries is not None:
            is_loss = batch.recorded_head_ranks < batch.num_loss_heads
            loss_ranks = batch.recorded_head_ranks[is_loss]
            loss_rows = batch.rows[batch.recorded_heads[is_loss]]

        def of_queries(field: str) -> Tensor:
            if queries is None:
                return whole(field)
            out = self._buffer(field, queries.shape[0], view.layout.widths[field])
            out[loss_ranks] = self._fetch(layer, field, loss_rows)
            if own is not None:
                ranks = batch.missing_head_ranks
                out[ranks[ranks < batch.num_loss_heads]] = getattr(own, field)
            return out

        kv = (self._shape.num_kv_heads, self._shape.head_dim)
        keys, values = (
            self._buffer(f, total, kv[0] * kv[1]).unflatten(1, kv) for f in ("keys", "values")
        )
        view.fetch_kv(layer, batch.rows, batch.slots, keys[:n], values[:n])
        if own is not None:
            keys[n:], values[n:] = own.keys, own.values
        return LayerValues(
            x=whole("x"),
            q=of_queries("q"),
            k=whole("k") if self._shape.has_qk_norm else None,
            attn=of_queries("attn"),
            mid=of_queries("mid"),
            gate_up=of_queries("gate_up"),
            keys=keys,
            values=values,
        )

    def _buffer(self, field: str, length: int, width: int) -> Tensor:
        """[length, width], the same memory in every layer: fresh pages would cost nearly as much as filling them. The
        layer before must have released what it had in it.
        """
        buffer = self._buffers.get(field)
        if buffer is None or buffer.shape[0] < length:
            self._buffers.pop(field, None)
            buffer = self._buffers[field] = self._w.embed.new_empty(length, width)
        return buffer[:length].detach()

    def _fetch(self, layer: int, field: str, rows: Tensor) -> Tensor:
        assert self._view is not None
        out = self._w.embed.new_empty(rows.shape[0], self._view.layout.widths[field])
        self._view.fetch(layer, field, rows, out)
        return out

    def _check(self, batch: TokenBatch) -> None:
        assert self._view is not None
        self._view.check(batch.rows, batch.gens)

    def _confirm(self, batch: TokenBatch) -> None:
        """Everything that was read was what it should be: to be known before anything is made of it."""
        if batch.num_recorded and self._view is not None:
            self._view.confirm()


def _keep(values: LayerValues, n: int, last_of: TokenBatch | None) -> LayerValues:
    """The first n tokens' values; of the last layer, per query, those of the loss heads."""
    if last_of is None:
        cut = slice(0, n)
        return LayerValues(**{f: _cut(getattr(values, f), cut) for f in _FIELDS})
    is_loss = last_of.missing_head_ranks < last_of.num_loss_heads
    # Head order, which is the order of queries in the backward pass.
    per_query = {f: getattr(values, f)[is_loss] for f in ("q", "attn", "mid", "gate_up")}
    per_token = {f: _cut(getattr(values, f), slice(0, n)) for f in ("x", "k", "keys", "values")}
    return LayerValues(**per_query, **per_token)


_FIELDS = ("x", "q", "k", "attn", "mid", "gate_up", "keys", "values")


def _cut(tensor: Tensor | None, part: slice) -> Tensor | None:
    if tensor is None or part.stop == tensor.shape[0]:
        return tensor
    return tensor[part].clone()


def _layer_weights(adapter: LoraAdapter, layer: int) -> dict[str, Tensor]:
    marker = f".layers.{layer}."
    return {name: t for name, t in adapter.weights.items() if marker in name}
