"""Model families the trainer differentiates, described by one `ModelShape`.

Llama, Mistral, Qwen2 and Qwen3 are one decoder layer with four switches: biases (present in the
weights or not), norm on queries and keys, grouped heads, tied embeddings. Anything that layer
cannot express is refused by name: never a wrong gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from alchemist.protocol.layout import ActivationDtype, RowLayout
from alchemist.protocol.models import architecture, require_supported


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes and constants of one model. `inv_freq` is [head_dim/2] float32 on the CPU."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    has_qk_norm: bool
    tied_embeddings: bool
    inv_freq: Tensor
    attention_scaling: float

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """From a transformers configuration.

        Raises:
            UnsupportedModelError: architecture, activation, rope or attention variant is not
                supported.
        """
        require_supported(config)
        name = architecture(config)
        inv_freq, attention_scaling = _rope(config)
        heads = config.num_attention_heads
        return cls(
            architecture=name,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            has_qk_norm=name == "Qwen3ForCausalLM",
            tied_embeddings=bool(config.tie_word_embeddings),
            inv_freq=inv_freq,
            attention_scaling=attention_scaling,
        )

    @property
    def qkv_splits(self) -> tuple[int, int, int]:
        """Rows of `qkv_proj.weight` that make queries, keys, values."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    def row_layout(
        self, dtype: torch.dtype, activation_dtype: ActivationDtype = "auto"
    ) -> RowLayout:
        """What serving records of this model when it computes in `dtype`, its KV cache, too."""
        return RowLayout(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            has_qk_norm=self.has_qk_norm,
            dtype=str(dtype).removeprefix("torch."),
            cell=self.num_kv_heads * self.head_dim,
            activation_dtype=activation_dtype,
        )

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotary tables [T, head_dim/2] in `dtype`; the angles are float32, as server and
        transformers have them.
        """
        angles = positions.float()[:, None] * self.inv_freq.to(positions.device)
        return (
            (angles.cos() * self.attention_scaling).to(dtype),
            (angles.sin() * self.attention_scaling).to(dtype),
        )


def load_shape(model_path: str) -> ModelShape:
    """From a model directory or hub name; runs no code of the model's."""
    return ModelShape.from_config(AutoConfig.from_pretrained(model_path, trust_remote_code=False))


def _rope(config: Any) -> tuple[Tensor, float]:
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind == "default":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    if kind == "dynamic":
        # The server fixes the base once, for the longest length it would serve; transformers lets
        # it follow the current length. Keys in the KV pool are the server's.
        longest = int(config.max_position_embeddings * parameters["factor"])
        return ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=longest)
    return ROPE_INIT_FUNCTIONS[kind](config, None)
