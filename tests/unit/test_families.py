"""Logits of every family and rope variant against transformers; what we do not support is refused by name."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from engine_support import FAMILIES, VOCAB, engine_of, naive_logps, random_model

from alchemist.protocol.models import UnsupportedModelError
from alchemist.trainer.families import ModelShape
from alchemist.trainer.weights import BaseWeights, fused_from_hf

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def sequences(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5 + 9 * i, 4))
        for i in range(count)
    ]


def worst_error(model, pairs):
    ours = engine_of(model).score(pairs, None)
    with torch.no_grad():
        naive = [naive_logps(model, *pair) for pair in pairs]
    return max(float((a - b).abs().max()) for a, b in zip(ours, naive, strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_transformers(family, rope, dtype, limit):
    model = random_model(family, dtype, rope_parameters=ROPES[rope])
    assert worst_error(model, sequences(1)) < limit


@pytest.mark.parametrize("change", [{"tie_word_embeddings": True}, {"num_key_value_heads": 4}])
def test_tied_embeddings_and_ungrouped_heads(change):
    assert worst_error(random_model("llama", torch.float64, **change), sequences(2)) < 1e-12


def test_dynamic_rope_is_the_servers():
    """The server fixes the base at the longest length; transformers agrees at exactly that length."""
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    model = random_model("llama", torch.float64, rope_parameters=rope, max_position_embeddings=16)
    pairs = [(sequences(3, 4)[3][0][:28], [1, 2, 3, 4])]
    assert worst_error(model, pairs) < 1e-12
    from sglang.srt.layers.rotary_embedding.rope_variant import DynamicNTKScalingRotaryEmbedding

    server = SimpleNamespace(
        max_position_embeddings=16,
        scaling_factor=2,
        base=500.0,
        rotary_dim=6,
        _compute_inv_freq=lambda base: 1.0 / base ** (torch.arange(0, 6, 2).float() / 6),
    )
    theirs = DynamicNTKScalingRotaryEmbedding._compute_cos_sin_cache(server)
    cos, sin = ModelShape.from_config(model.config).cos_sin(torch.arange(32), torch.float32)
    torch.testing.assert_close(torch.cat([cos, sin], dim=-1), theirs)


def test_a_rope_error_would_be_seen():
    model = random_model("llama", torch.float64, rope_parameters=ROPES["llama3"])
    engine = engine_of(model)
    engine.shape.inv_freq.mul_(1.001)
    with torch.no_grad():
        naive = naive_logps(model, *sequences(1)[2])
    assert (engine.score(sequences(1)[2:], None)[0] - naive).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.GPT2Config(), ["GPT2", "Qwen3ForCausalLM"]),
        (transformers.MistralConfig(sliding_window=128), ["Mistral", "sliding_window=128"]),
        (transformers.LlamaConfig(hidden_act="gelu"), ["hidden_act", "gelu", "silu"]),
        (
            transformers.Qwen2Config(use_sliding_window=True, sliding_window=64),
            ["sliding_window=64"],
        ),
    ],
)
def test_unsupported_models_are_refused_by_name(config, words):
    with pytest.raises(UnsupportedModelError) as error:
        ModelShape.from_config(config)
    assert all(word in str(error.value) for word in words)


def test_row_layout_has_the_models_sizes():
    shape = ModelShape.from_config(random_model("qwen3").config)
    layout = shape.row_layout(torch.bfloat16)
    assert layout.dtype == "bfloat16"
    assert layout.fields["k"] == (24 + 40, 20)
    assert layout.width == 24 + 40 + 20 + 40 + 24 + 80


def test_weights_are_views_and_checked():
    model = random_model("qwen2")
    shape = ModelShape.from_config(model.config)
    tensors = fused_from_hf(model)
    weights = BaseWeights(tensors, shape)
    assert weights.layers[1].qkv.data_ptr() == (
        tensors["model.layers.1.self_attn.qkv_proj.weight"].data_ptr()
    )
    assert weights.lm_head.shape == (VOCAB, 24)
    assert tensors["model.embed_tokens.weight"].shape == (64, 24)
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match="have no"):
        BaseWeights({k: v for k, v in tensors.items() if k != name}, shape)
    with pytest.raises(ValueError, match="down_proj"):
        BaseWeights(tensors | {name: tensors[name].T}, shape)
