"""How much memory a training step takes: `docs/memory.md` says where each term comes from."""

from __future__ import annotations

import torch

from alchemist.kernels.dispatch import CACHED
from alchemist.kernels.gated_mlp import num_pieces
from alchemist.kernels.linear_logprob import CHUNK_BYTES
from alchemist.kernels.path_attention.cpu import TILE

from .families import ModelShape
from .lora import LoraConfig, module_sizes


def step_bytes(
    shape: ModelShape,
    dtype: torch.dtype,
    lora: LoraConfig,
    *,
    recorded: int,
    missing: int,
    response: int,
    longest: int,
    scored: int = 0,
    reference: bool = False,
) -> int:
    """Bytes that `ReplayEngine.step_gradients` allocates at its peak, above what the caller holds
    (base weights, recorded rows, adapter). An upper bound; within half again for batches of more than
    a thousand tokens or so.

    Args:
        recorded, missing, scored: unique tokens of the largest micro-batch: with a row; without one, on
            the path of a completion; of the KL estimate's pairs only.
        response: tokens of that micro-batch's completions.
        longest: tokens of its longest completion, prompt included.
        reference: the base scores the same tokens first.
    """
    h, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_layers
    q, kv, _ = shape.qkv_splits
    normed_qk = q + kv if shape.has_qk_norm else 0
    wide = max(dtype.itemsize, 4)
    differentiated, computed = recorded + missing, missing + scored
    heads = response + scored

    values = 2 * h + 2 * q + 3 * kv + 2 * inner
    kept = missing * values
    below = max(0, layers - 2) * kept
    path, score_tile = longest * kv, shape.num_heads * TILE * longest

    def piece(tokens: int) -> int:
        """Tokens that the MLP takes at a time."""
        return -(-tokens // num_pieces(tokens, torch.device("cpu"), dtype))

    def joined(tokens: int) -> int:
        """What the MLP's pieces hold while they become one: no more where all is one piece."""
        return tokens * 2 * h if piece(tokens) < tokens else 0

    def forward_peak(tokens: int, rows: int, kept: int, *, has_backward: bool = True) -> int:
        gate_up = 2 * inner if has_backward else 0
        mlp = tokens * (5 * h + 2 * q + 3 * kv + normed_qk + gate_up)
        mlp += piece(tokens) * (3 * inner - gate_up) + joined(tokens)
        keys = 2 * (rows + tokens) * kv if rows else 0
        attention = tokens * (2 * h + 5 * q + 3 * kv + normed_qk)
        after = tokens * (values - 2 * inner + gate_up + h) + kept
        return max(mlp, attention + keys + 2 * path + 3 * score_tile, after)

    peaks = [below + forward_peak(computed, recorded, kept if scored else 0)]
    if reference:
        peaks.append(forward_peak(differentiated + scored, 0, 0, has_backward=False))
    row = values if not recorded else values - (0 if shape.has_qk_norm else kv)
    swiglu = piece(differentiated) * 3 * inner + 4 * min(differentiated * inner, CACHED)
    swiglu += differentiated * (3 * h + q) + joined(differentiated)
    attention = differentiated * (4 * h + 5 * q + 4 * kv) + 4 * path + 5 * score_tile
    fetch = kept + differentiated * h if recorded else 0
    peaks.append(below + differentiated * row + max(swiglu, attention, fetch))
    # In the last layer only answer positions go past keys and values.
    past_keys = 5 * h + 2 * q + normed_qk + 3 * inner
    last_forward = computed * (2 * h + 4 * kv) + heads * past_keys
    last_backward = differentiated * (3 * h + 6 * kv) + response * (5 * h + 3 * q + 5 * inner)
    peaks.append(max(1, layers - 1) * kept + max(last_forward, last_backward))
    last = missing * (h + 3 * kv) + response * (2 * q + h + 2 * inner)
    chunk = min(heads * shape.vocab_size * wide, CHUNK_BYTES)
    # The logits and log-sum-exp's temporary, and the logits before they are widened.
    chunk = 2 * chunk + (chunk // 2 if dtype.itemsize < wide else 0)
    at_head = ((layers - 1) * kept + last) * dtype.itemsize + max(chunk, 4 * response * h * wide)
    parameters = layers * sum(
        lora.rank * sum(size)
        for name, size in module_sizes(shape).items()
        if name in lora.target_modules
    )
    activations = max(max(peaks) * dtype.itemsize, at_head + heads * h * dtype.itemsize)
    tables = (differentiated + scored) * (3 * shape.head_dim * wide + 8 * 20)
    tables += recorded * 16 * shape.row_layout(dtype).slots_per_row
    return activations + tables + 2 * heads * h * wide + 3 * parameters * wide
