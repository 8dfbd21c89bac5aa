"""Adapters on a machine without a GPU at a price that small models can pay: SGLang's `torch_native` backend, lightened.

It indexes with tensors of one element in every linear of every layer, walks all of them even when no request of the
batch has an adapter, and adds q, k and v (gate and up) one after the other, each to a part of the output. Here two
products do it, for every stretch of tokens that have the same adapter; nearly always it is one, of the live version:

    y += s · (x Aᵀ) W        W [n·r, E]: the n slices' Bᵀ [r, E_i] on the diagonal, zeros elsewhere

W is made once for each adapter that is loaded. Where tokens are many its zeros cost more than calls do, and each slice
is added by itself.

Of a small model even that is a large part of a prompt's work: at rank 16 and a width of 192 a seventh of the products.
So as long as a whole batch has one adapter, its linears have weights of their own, base + s · B A, of which there is a
copy for each adapter, as far as `MERGED_BYTES` go: then an adapter costs nothing. In float32 only: in 16 bits the
sum would round most of the adapter away.

Where nothing is left to be added, the lines of SGLang's wrappers and of what they wrap still cost a small model's
decode step some percent. A linear of one device is a product and no more: it is called as that then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

LINEARS = (
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "QKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
)
"""SGLang's linears with an `apply_lora` of their own; in `sglang.srt.lora.layers`."""
MANY_TOKENS = 256
"""From which one product with W takes longer than one for each slice; measured on the embedded model's q, k, v and
gate, up at rank 16.
"""
MERGED_BYTES = 64 << 20
"""That merged weights may take, of all adapters together; the embedded model's are 7 MiB each. Of a larger model an
adapter is a small part of the work, and merging it, which is done while requests wait, takes long.
"""


_Forward = Callable[..., Any]


@dataclass(eq=False)
class Adapter:
    """One that lies in SGLang's buffers."""

    uid: str
    index: int
    """Of SGLang's buffers."""
    rank: int
    scaling: float
    matrices: dict[torch.nn.Module, tuple[Tensor, Tensor, list[int]]] = field(default_factory=dict)

    def of(self, layer: Any) -> tuple[Tensor, Tensor, list[int]]:
        """Aᵀ [D, n·r], a view of SGLang's buffer; W; and the n + 1 ends of the output's slices, from 0 to E."""
        found = self.matrices.get(layer)
        if found is None:
            is_qkv = hasattr(layer, "A_buffer_qkv")
            a = layer.A_buffer_qkv if is_qkv else layer.A_buffer
            b = layer.B_buffer_qkv if is_qkv else layer.B_buffer
            ends = layer.output_offset_cpu.tolist()
            r = self.rank
            w = b.new_zeros((len(ends) - 1) * r, ends[-1])
            for i, (start, end) in enumerate(pairwise(ends)):
                w[i * r : (i + 1) * r, start:end] = b[self.index, start:end, :r].T
            found = self.matrices[layer] = a[self.index, : w.shape[0]].T, w, ends
        return found

    def merged(self, layer: Any) -> Tensor:
        """The layer's weight [E, D] with the adapter in it."""
        a, w, _ = self.of(layer)
        return torch.addmm(layer.base_layer.weight, w.T, a.T, alpha=self.scaling)

    def add(self, layer: Any, y: Tensor, x: Tensor) -> None:
        """To `y` [T, E], the layer's output for `x` [T, D]."""
        a, w, ends = self.of(layer)
        low = x @ a
        if len(ends) == 2 or x.shape[0] < MANY_TOKENS:
            y.addmm_(low, w, alpha=self.scaling)
            return
        for i, (start, end) in enumerate(pairwise(ends)):
            mine = slice(i * self.rank, (i + 1) * self.rank)
            y[:, start:end].addmm_(low[:, mine], w[mine, start:end], alpha=self.scaling)


class CpuLora:
    """Of one scheduler process: which adapters the tokens of its batch have."""

    def __init__(self) -> None:
        self._by_index: dict[int, Adapter] = {}
        self._stretches: list[tuple[slice, Adapter]] | None = None
        """Of the batch that is being computed: its tokens that have an adapter. None: it goes SGLang's way."""
        self._copies: dict[Adapter, list[_Forward]] = {}
        """By adapter, the one used last at the end: of each wrapped linear the product with its merged weights."""
        self._linears: list[Any] = []
        """SGLang's wrappers."""
        self._bare: list[_Forward] = []
        """Of each, what it computes for the base model."""

    def prepare_batch(self, original: Any, manager: Any, forward_batch: Any) -> None:
        """AROUND `LoRAManager.prepare_lora_batch`, whose thirty small tensors nobody would read."""
        if not self._linears:
            self._linears = [w for w in _wrapped(manager) if type(w).__name__ in LINEARS]
            self._bare = [_bare(layer) for layer in self._linears]
        forwards = self._prepare(original, manager, forward_batch)
        # Nothing prepared is the layers' own sign for "base path only".
        if forwards is None and manager.lora_backend.batch_info is None:
            forwards = self._bare
        self._take_the_place(forwards)

    def _prepare(self, original: Any, manager: Any, forward_batch: Any) -> list[_Forward] | None:
        """Of each wrapped linear, what this batch takes instead of it; None: nothing, or the base model's."""
        self._stretches = None
        backend = manager.lora_backend
        lengths = _lengths(forward_batch)
        # What else SGLang may wrap reads what its backend prepares.
        has_others = manager.embed_tokens_module is not None or manager.lm_head_module is not None
        in_graphs = hasattr(manager, "max_bs_in_cuda_graph")
        if backend.name != "torch_native" or in_graphs or has_others or lengths is None:
            original(manager, forward_batch)
            return None
        manager.reset_lora_batch()
        if not any(forward_batch.lora_ids):
            return None
        backend.batch_info = self
        self._stretches, start = [], 0
        for uid, same in groupby(
            zip(forward_batch.lora_ids, lengths, strict=True), key=itemgetter(0)
        ):
            end = start + sum(length for _, length in same)
            adapter = self._adapter(manager, uid)
            if adapter is not None:
                self._stretches.append((slice(start, end), adapter))
            start = end
        if len(self._stretches) != 1 or self._stretches[0][0] != slice(0, start):
            return None
        merged = self._merge(self._stretches[0][1], manager)
        if merged is not None:
            manager.reset_lora_batch()
        return merged

    def apply(self, original: Any, layer: Any, base_output: Tensor, x: Tensor) -> Tensor:
        """AROUND `apply_lora` of a linear: adds the adapters to `base_output` [T, E], in place as SGLang does."""
        if self._stretches is None:
            result: Tensor = original(layer, base_output, x)
            return result
        for tokens, adapter in self._stretches:
            adapter.add(layer, base_output[tokens], x[tokens])
        return base_output

    def _take_the_place(self, forwards: list[_Forward] | None) -> None:
        """Of the wrapped linears; None: they are called themselves."""
        if forwards is None:
            for layer in self._linears:
                vars(layer).pop("forward", None)
            return
        for layer, forward in zip(self._linears, forwards, strict=True):
            vars(layer)["forward"] = forward

    def _merge(self, adapter: Adapter, manager: Any) -> list[_Forward] | None:
        """Of each wrapped linear, the product with the weight that has the adapter in it; None: that is not to be."""
        copy = self._copies.pop(adapter, None)
        if copy is None:
            layers = _wrapped(manager)
            if not all(map(_can_merge, layers)):
                return None
            size = sum(layer.base_layer.weight.nbytes for layer in layers)
            if size > MERGED_BYTES:
                return None
            while (len(self._copies) + 1) * size > MERGED_BYTES:
                del self._copies[next(iter(self._copies))]
            copy = [_product(adapter.merged(layer), layer.base_layer.bias) for layer in layers]
        self._copies[adapter] = copy
        return copy

    def _adapter(self, manager: Any, uid: str | None) -> Adapter | None:
        """As it lies in SGLang's buffers; None: none, its tokens are the base model's."""
        if uid is None:
            return None
        index = manager.memory_pool.get_buffer_id(uid)
        known = self._by_index.get(index)
        if known is None or known.uid != uid:
            lora = manager.loras[uid]
            known = Adapter(uid, index, int(lora.config.r), float(lora.scaling))
            if index in self._by_index:
                self._copies.pop(self._by_index[index], None)
            self._by_index[index] = known
        return known


def _wrapped(manager: Any) -> list[Any]:
    """SGLang's wrappers, of all layers of the model."""
    return [layer for modules in manager.lora_modules for layer in modules.values()]


def _can_merge(layer: Any) -> bool:
    return _is_product(layer) and layer.base_layer.weight.dtype == torch.float32


def _is_product(layer: Any) -> bool:
    """Whether what is wrapped is a product, and its output one that nobody else has a part of."""
    base = layer.base_layer
    return (
        type(layer).__name__ in LINEARS
        and type(base.quant_method).__name__ == "UnquantizedLinearMethod"
        and not getattr(base, "use_intel_amx_backend", False)
        and base.tp_size == 1
        and not base.skip_bias_add
    )


def _bare(layer: Any) -> _Forward:
    base = layer.base_layer
    if _is_product(layer):
        return _product(base.weight, base.bias)
    forward: _Forward = base.forward
    return forward


def _product(weight: Tensor, bias: Tensor | None) -> _Forward:
    linear = torch.nn.functional.linear

    def forward(
        x: Tensor, skip_all_reduce: bool = False, forward_batch: Any = None
    ) -> tuple[Tensor, None]:
        """As SGLang's wrappers are called; what they return. Of one device there is nothing to be reduced."""
        return linear(x, weight, bias), None

    return forward


def _lengths(forward_batch: Any) -> Sequence[int] | None:
    """Tokens of each request in this forward; None: speculation, which has rules of its own."""
    mode = forward_batch.forward_mode
    if mode.is_decode():
        return [1] * len(forward_batch.lora_ids)
    if mode.is_target_verify() or not mode.is_extend():
        return None
    lengths: list[int] = forward_batch.extend_seq_lens_cpu
    return lengths
