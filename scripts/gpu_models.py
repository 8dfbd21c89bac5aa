"""Models of the true shape with random weights: as tensors for the trainer, as directories for a server.

A directory holds a config.json and a tokenizer with one word for every token id: SGLang's benchmark client counts a
token when it sees its text, so every id must have one. Weights are SGLang's own dummy ones (`--load-format dummy`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alchemist.server.main import TINY_MODEL
from alchemist.trainer.families import ModelShape

_QWEN3_8B = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
_LLAMA31_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
_SMALL = {
    "vocab_size": 1536,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The embedded model's sizes."""


def model_config(key: str, *, is_tiny: bool, num_layers: int = 0) -> Any:
    """A transformers configuration.

    Args:
        key: of `gpu_rows.MODELS`.
        is_tiny: the embedded model's sizes in place of the true ones.
        num_layers: fewer layers of the same width; 0: all.
    """
    import transformers

    kind, sizes = {
        "qwen3_8b": (transformers.Qwen3Config, _QWEN3_8B),
        "llama31_8b": (transformers.LlamaConfig, _LLAMA31_8B),
    }[key]
    sizes = sizes | (_SMALL if is_tiny else {})
    if num_layers:
        sizes = sizes | {"num_hidden_layers": min(num_layers, int(sizes["num_hidden_layers"]))}
    name = kind.__name__.replace("Config", "ForCausalLM")
    return kind(
        **sizes,
        architectures=[name],
        dtype="bfloat16",
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def model_directory(key: str, folder: Path, *, is_tiny: bool) -> Path:
    """A directory that SGLang can serve with `--load-format dummy`; the embedded model itself when tiny."""
    path = folder / key
    if is_tiny:
        return Path(TINY_MODEL)
    if path.is_dir():
        return path
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    config = model_config(key, is_tiny=False)
    temporary = folder / f"{key}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    config.save_pretrained(temporary)
    GenerationConfig(eos_token_id=config.eos_token_id).save_pretrained(temporary)
    words = {f"t{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=f"t{config.bos_token_id}",
        eos_token=f"t{config.eos_token_id}",
    ).save_pretrained(temporary)
    temporary.rename(path)
    return path


def random_weights(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Tensor]:
    """What `BaseWeights` takes: SGLang's fused layout, normal with deviation 0.02; norms around one."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)

    def norm(size: int) -> Tensor:
        out = torch.empty(size, dtype=dtype, device=device)
        return out.normal_(1, 0.1, generator=generator)

    hidden, inner, vocab = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    padded = -(-vocab // 64) * 64
    out = {
        "model.embed_tokens.weight": normal(padded, hidden),
        "lm_head.weight": normal(padded, hidden),
        "model.norm.weight": norm(hidden),
    }
    for i in range(shape.num_layers):
        prefix = f"model.layers.{i}."
        out |= {
            f"{prefix}self_attn.qkv_proj.weight": normal(sum(shape.qkv_splits), hidden),
            f"{prefix}self_attn.o_proj.weight": normal(hidden, shape.qkv_splits[0]),
            f"{prefix}mlp.gate_up_proj.weight": normal(2 * inner, hidden),
            f"{prefix}mlp.down_proj.weight": normal(hidden, inner),
            f"{prefix}input_layernorm.weight": norm(hidden),
            f"{prefix}post_attention_layernorm.weight": norm(hidden),
        }
        if shape.has_qk_norm:
            for name in ("q_norm", "k_norm"):
                out[f"{prefix}self_attn.{name}.weight"] = norm(shape.head_dim)
    return out


def as_transformers(config: Any, weights: dict[str, Tensor]) -> Any:
    """A transformers model over the very same memory: its parameters are views of the fused tensors."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(config)
    q, kv, _ = shape.qkv_splits
    cuts = {
        "q_proj": ("qkv_proj", 0, q),
        "k_proj": ("qkv_proj", q, kv),
        "v_proj": ("qkv_proj", q + kv, kv),
        "gate_proj": ("gate_up_proj", 0, shape.intermediate_size),
        "up_proj": ("gate_up_proj", shape.intermediate_size, shape.intermediate_size),
    }
    state = {}
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        if module in cuts:
            fused, start, count = cuts[module]
            state[name] = weights[name.replace(module, fused)].narrow(0, start, count)
        else:
            state[name] = weights[name][: parameter.shape[0]]
    model.load_state_dict(state, strict=True, assign=True)
    # Not parameters, so not in the state: rotary tables are made anew, on the weights' device.
    device = weights["model.norm.weight"].device
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device=device)
    return model.requires_grad_(False)
