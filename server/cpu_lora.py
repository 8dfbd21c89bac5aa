"""Adapters on a machine without a GPU at a price that small models can pay: SGLang's `torch_native` backend, lightened.

It indexes with tensors of one element in every linear of every layer, walks all of them even when no request of the
batch has an adapter, and adds q, k and v (gate and up) one after the other, each to a part of the output. Here two
products do it, for every stretch of tokens that have the same adapter; nearly always it is one, of the live version:

    y += s · (x Aᵀ) W        W [n·r, E]: the n slices' Bᵀ [r, E_i] on the diagonal, zeros elsewhere

W is made once for each adapter that is loaded. Where tokens are many its zeros cost more than calls do, and each slice
is added by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def prepare_batch(self, original: Any, manager: Any, forward_batch: Any) -> None:
        """AROUND `LoRAManager.prepare_lora_batch`, whose thirty small tensors nobody would read."""
        self._stretches = None
        backend = manager.lora_backend
        lengths = _lengths(forward_batch)
        # What else SGLang may wrap reads what its backend prepares.
        has_others = manager.embed_tokens_module is not None or manager.lm_head_module is not None
        in_graphs = hasattr(manager, "max_bs_in_cuda_graph")
        if backend.name != "torch_native" or in_graphs or has_others or lengths is None:
            original(manager, forward_batch)
            return
        manager.reset_lora_batch()
        if not any(forward_batch.lora_ids):
            # Nothing prepared is the layers' own sign for "base path only".
            return
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

    def apply(self, original: Any, layer: Any, base_output: Tensor, x: Tensor) -> Tensor:
        """AROUND `apply_lora` of a linear: adds the adapters to `base_output` [T, E], in place as SGLang does."""
        if self._stretches is None:
            result: Tensor = original(layer, base_output, x)
            return result
        for tokens, adapter in self._stretches:
            adapter.add(layer, base_output[tokens], x[tokens])
        return base_output

    def _adapter(self, manager: Any, uid: str | None) -> Adapter | None:
        """As it lies in SGLang's buffers; None: none, its tokens are the base model's."""
        if uid is None:
            return None
        index = manager.memory_pool.get_buffer_id(uid)
        known = self._by_index.get(index)
        if known is None or known.uid != uid:
            lora = manager.loras[uid]
            known = Adapter(uid, index, int(lora.config.r), float(lora.scaling))
            self._by_index[index] = known
        return known


def _lengths(forward_batch: Any) -> Sequence[int] | None:
    """Tokens of each request in this forward; None: speculation, which has rules of its own."""
    mode = forward_batch.forward_mode
    if mode.is_decode():
        return [1] * len(forward_batch.lora_ids)
    if mode.is_target_verify() or not mode.is_extend():
        return None
    lengths: list[int] = forward_batch.extend_seq_lens_cpu
    return lengths
