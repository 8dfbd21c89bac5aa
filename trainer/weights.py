"""The base model's weights, as the server holds them: fused, frozen, borrowed.

Names and shapes (d head dim, V padded vocabulary, I intermediate):

    model.embed_tokens.weight                  [V, H]
    model.layers.N.self_attn.qkv_proj.weight   [(n_q + 2·n_kv)·d, H]   rows q | k | v
    model.layers.N.self_attn.qkv_proj.bias     optional
    model.layers.N.self_attn.{q,k}_norm.weight [d], with q/k-norm
    model.layers.N.self_attn.o_proj.weight     [H, n_q·d]              bias optional
    model.layers.N.mlp.gate_up_proj.weight     [2I, H]                 rows gate | up, bias optional
    model.layers.N.mlp.down_proj.weight        [H, I]                  bias optional
    model.layers.N.{input,post_attention}_layernorm.weight             [H]
    model.norm.weight                          [H]
    lm_head.weight                             [V, H], absent when tied
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import ModelShape


@dataclass(frozen=True)
class LayerWeights:
    """One layer's tensors: views of the server's."""

    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    input_norm: Tensor
    post_attention_norm: Tensor


class BaseWeights:
    """Borrowed views over `tensors`; nothing is copied or written.

    Raises:
        ValueError: a tensor is missing or has a shape that `shape` does not imply.
    """

    def __init__(self, tensors: Mapping[str, Tensor], shape: ModelShape) -> None:
        self.shape = shape
        self._tensors = {name: t.detach() for name, t in tensors.items()}
        hidden = shape.hidden_size
        embed = self._get("model.embed_tokens.weight", (None, hidden))
        head = embed if shape.tied_embeddings else self._get("lm_head.weight", (None, hidden))
        for name, table in (("embed_tokens", embed), ("lm_head", head)):
            if table.shape[0] < shape.vocab_size:
                raise ValueError(f"{name} has {table.shape[0]} rows, fewer than {shape.vocab_size}")
        self.embed = embed
        self.lm_head = head[: shape.vocab_size]
        self.norm = self._get("model.norm.weight", (hidden,))
        self.layers = [self._layer(i) for i in range(shape.num_layers)]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device

    def _get(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        if name not in self._tensors:
            raise ValueError(f"the base weights have no {name}")
        tensor = self._tensors[name]
        if tensor.dim() != len(shape) or any(
            want is not None and want != have
            for want, have in zip(shape, tensor.shape, strict=True)
        ):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        return tensor

    def _layer(self, index: int) -> LayerWeights:
        s, prefix = self.shape, f"model.layers.{index}."
        hidden, qkv, inner = s.hidden_size, sum(s.qkv_splits), s.intermediate_size
        optional = self._tensors.get

        def norm(name: str) -> Tensor | None:
            return (
                self._get(f"{prefix}self_attn.{name}.weight", (s.head_dim,))
                if s.has_qk_norm
                else None
            )

        return LayerWeights(
            qkv=self._get(f"{prefix}self_attn.qkv_proj.weight", (qkv, hidden)),
            qkv_bias=optional(f"{prefix}self_attn.qkv_proj.bias"),
            q_norm=norm("q_norm"),
            k_norm=norm("k_norm"),
            o=self._get(f"{prefix}self_attn.o_proj.weight", (hidden, s.qkv_splits[0])),
            o_bias=optional(f"{prefix}self_attn.o_proj.bias"),
            gate_up=self._get(f"{prefix}mlp.gate_up_proj.weight", (2 * inner, hidden)),
            gate_up_bias=optional(f"{prefix}mlp.gate_up_proj.bias"),
            down=self._get(f"{prefix}mlp.down_proj.weight", (hidden, inner)),
            down_bias=optional(f"{prefix}mlp.down_proj.bias"),
            input_norm=self._get(f"{prefix}input_layernorm.weight", (hidden,)),
            post_attention_norm=self._get(f"{prefix}post_attention_layernorm.weight", (hidden,)),
        )


def fused_from_hf(model: Any, pad_to: int = 64) -> dict[str, Tensor]:
    """The server's tensors from a transformers model: fused copies, vocabulary padded to `pad_to`
    with zeros.

    For tests and benchmarks; serving hands over its own tensors.
    """
    state = {name: t.detach() for name, t in model.state_dict().items()}
    fused: dict[str, Tensor] = {}
    groups = {"q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj"))}
    groups["gate_proj"] = ("gate_up_proj", ("gate_proj", "up_proj"))
    tail = {member for _, members in groups.values() for member in members[1:]}
    for name, tensor in state.items():
        module = name.split(".")[-2]
        if module in tail:
            continue
        if module in groups:
            target, members = groups[module]
            parts = [state[name.replace(module, member)] for member in members]
            fused[name.replace(module, target)] = torch.cat(parts)
        elif module in ("embed_tokens", "lm_head"):
            if module == "lm_head" and model.config.tie_word_embeddings:
                continue
            fused[name] = torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[0] % pad_to))
        else:
            fused[name] = tensor
    return fused
