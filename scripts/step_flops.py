"""Floating-point operations of a step, by formula, and as torch counts them.

A product of [m, k] and [k, n] is 2·m·k·n; what is elementwise is not counted. For a completion of P prompt and R
response tokens, of which the last is never read, S = P + R − 1 tokens go through the layers. The forward computes M of
them: S, or R − 1 when the prompt is recorded; the backward differentiates all S. In the last layer only the R heads,
which predict the response, go past keys and values. For N tokens and a linear layer from D to E with adapters of rank r
on n parts of it, and for each pair of query and key of an attention whose heads' width is Q in all:

    linear      forward 2·N·(D·E + r·(n·D + E)), backward 2·N·(D·E + r·(3·n·D + 2·E)) with the gradient of the input
                and 2·N·r·(2·n·D + 2·E) without: layer 0's qkv
    attention   forward 2 · 2·Q, backward 5 · 2·Q
    LM head     4·R·H·V: the logits, and the expected row that is their gradient

Pairs are counted as they are computed: a tile of 64 queries sees all keys up to its last. The final hidden state of a
recorded head costs the last layer's down projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from step_workload import WorkloadConfig
from torch.utils.flop_counter import FlopCounterMode

from alchemist.kernels.path_attention.cpu import TILE, aligned


class Flops(NamedTuple):
    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def sft_flops(config: WorkloadConfig, *, recorded: bool) -> Flops:
    """Of one step of `sft`, every completion with a prompt of its own."""
    if config.shared:
        raise ValueError("the formula is of completions that share nothing")
    sequence = config.prompt + config.response - 1
    heads = config.response
    computed = heads - 1 if recorded else sequence
    computed_heads = heads - 1 if recorded else heads
    forward = backward = 0
    for layer in range(config.num_layers):
        last = layer == config.num_layers - 1
        queries = computed_heads if last else computed
        forward += sum(
            _linear(config, n, fan_in, outputs)
            for n, fan_in, outputs in _linears(config, computed, queries)
        )
        forward += 2 * _attention(config, sequence, queries)
        queries = heads if last else sequence
        for i, (n, fan_in, outputs) in enumerate(_linears(config, sequence, queries)):
            # The first two are of qkv, whose input in layer 0 is the embedding.
            backward += _linear_backward(config, n, fan_in, outputs, has_dx=layer > 0 or i > 1)
        backward += 5 * _attention(config, sequence, queries)
    # A recorded head's final hidden state: the last layer's `down`.
    forward += _linear(
        config, heads - computed_heads, config.intermediate_size, (config.hidden_size,)
    )
    forward += 4 * heads * config.hidden_size * config.vocab_size
    return Flops(config.batch * forward, config.batch * backward)


def _linears(
    config: WorkloadConfig, tokens: int, queries: int
) -> list[tuple[int, int, tuple[int, ...]]]:
    """(tokens, inputs, outputs of each adapter) of a layer's linears: q, k and v, o, gate and up, down."""
    head_dim = config.hidden_size // config.num_heads
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return [
        (queries, hidden, (q,)),
        (tokens, hidden, (kv, kv)),
        (queries, q, (hidden,)),
        (queries, hidden, (inner, inner)),
        (queries, inner, (hidden,)),
    ]


def _linear(config: WorkloadConfig, n: int, fan_in: int, outputs: tuple[int, ...]) -> int:
    return 2 * n * (fan_in * sum(outputs) + config.rank * (len(outputs) * fan_in + sum(outputs)))


def _linear_backward(
    config: WorkloadConfig, n: int, fan_in: int, outputs: tuple[int, ...], *, has_dx: bool
) -> int:
    thin = config.rank * len(outputs) * fan_in
    flops = 2 * thin + 2 * config.rank * sum(outputs)
    if has_dx:
        flops += fan_in * sum(outputs) + thin
    return 2 * n * flops


def _attention(config: WorkloadConfig, sequence: int, queries: int) -> int:
    """One product over all pairs of the sequence's last `queries` tokens and the keys they see."""
    pairs = 0
    for start in range(sequence - queries, sequence, TILE):
        end = min(start + TILE, sequence)
        pairs += (end - start) * aligned(end)
    return 2 * config.hidden_size * pairs


def counted(step: Callable[[], object]) -> int:
    """Operations of the matrix products of one call, by torch's counter."""
    # It knows the products, but not those that add in place.
    in_place = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), _added)
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    return counter.get_total_flops()


def _added(_: object, a: torch.Size, b: torch.Size, **__: object) -> int:
    return 2 * math.prod(a) * b[-1]
