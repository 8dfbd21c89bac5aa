"""Logits of every family and rope variant against transformers; what we do not support is refused by name."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from engine_support import (
    FAMILIES,
    VOCAB,
    engine_of,
    naive_logps,
    random_adapter,
    random_model,
    with_peft,
)

from alchemist.protocol.models import ROPE_TYPES, UnsupportedModelError
from alchemist.trainer.families import ModelShape
from alchemist.trainer.lora import MODULES, LoraConfig
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
    "yarn with all its constants": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


def sequences(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5 + 9 * i, 4))
        for i in range(count)
    ]


def worst_error(model, pairs, adapter=None):
    ours = engine_of(model).score(pairs, adapter)
    adapted = model if adapter is None else with_peft(model, adapter)
    with torch.no_grad():
        naive = [naive_logps(adapted, *pair) for pair in pairs]
    return max(float((a - b).abs().max()) for a, b in zip(ours, naive, strict=True))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_transformers(family, rope, dtype):
    model = random_model(family, dtype, rope_parameters=ROPES[rope])
    assert worst_error(model, sequences(1)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_rope_equals_transformers_at_the_longest_length(family, dtype):
    """The server fixes the base there; in transformers it follows the length."""
    model = random_model(family, dtype, rope_parameters=DYNAMIC, max_position_embeddings=16)
    prompt = sequences(3, 4)[3][0][:28]
    # transformers makes the base from a length that is a tensor: frequencies differ in float32's last bit.
    limit = max(LIMITS[dtype], 1e-6)
    assert worst_error(model, [(prompt, [1, 2, 3, 4])]) < limit


def test_every_rope_type_is_tested():
    assert {r["rope_type"] for r in [*ROPES.values(), DYNAMIC]} == set(ROPE_TYPES)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": False, "mlp_bias": False}),
        ("llama", {"attention_bias": True, "mlp_bias": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 14}),
        ("mistral", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("qwen2", {"rms_norm_eps": 1e-2}),
        ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
        ("qwen3", {"num_key_value_heads": 1, "rms_norm_eps": 1e-2}),
    ],
    ids=str,
)
def test_biases_tied_embeddings_and_head_counts(family, changes, dtype):
    assert worst_error(random_model(family, dtype, **changes), sequences(2)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "modules", [MODULES, *((m,) for m in MODULES), ("q_proj", "v_proj"), ("k_proj", "up_proj")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_logprobs_equal_peft(family, modules, use_rslora, dtype):
    model = random_model(family, dtype)
    config = LoraConfig(rank=4, alpha=2.0, target_modules=modules, use_rslora=use_rslora)
    adapter = random_adapter(engine_of(model).shape, dtype, 5, config)
    base = engine_of(model).score(sequences(4), None)
    moved = zip(engine_of(model).score(sequences(4), adapter), base, strict=True)
    assert max(float((a - b).abs().max()) for a, b in moved) > 1e-2
    assert worst_error(model, sequences(4), adapter) < LIMITS[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_next_token_distribution(family):
    """Every token as an answer of its own to one prompt: the log-softmax of one position's logits."""
    model = random_model(family)
    prompt = sequences(5)[1][0]
    ours = torch.cat(engine_of(model).score([(prompt, [v]) for v in range(VOCAB)], None))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(ours, logits.log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", [*ROPES.values(), DYNAMIC], ids=[*ROPES, "dynamic"])
def test_rope_is_the_servers(rope, monkeypatch):
    """Keys in the KV pool were rotated by it."""
    from sglang.srt.layers.rotary_embedding import base, get_rope

    # The only thing its constructor asks of a running server.
    settings = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    monkeypatch.setattr(base, "get_exec", lambda: settings)
    config = transformers.LlamaConfig(
        hidden_size=24, num_attention_heads=2, max_position_embeddings=16, rope_parameters=rope
    )
    theirs = get_rope(12, 12, 16, 500.0, True, dict(config.rope_parameters), torch.float32)
    cos, sin = ModelShape.from_config(config).cos_sin(torch.arange(16), torch.float32)
    torch.testing.assert_close(
        torch.cat([cos, sin], dim=-1), theirs.cos_sin_cache[:16], rtol=0, atol=1e-6
    )


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
        # The server does not read this one, transformers not the other.
        (
            transformers.Qwen3Config(rope_parameters=ROPES["yarn"] | {"attention_factor": 1.5}),
            ["attention_factor=1.5"],
        ),
        (
            transformers.Qwen3Config(rope_parameters=ROPES["yarn"] | {"attn_factor": 1.5}),
            ["attn_factor=1.5"],
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
    # In cells of 20: x takes two, of which the second is mostly empty, as mid does; q and attn two each, k one.
    assert layout.cell == 20
    assert layout.fields["k"] == (40 + 40, 20)
    assert layout.fields["gate_up"] == (40 + 40 + 20 + 40 + 40, 80)
    assert layout.width == 260 + 2 * 20
    assert layout.slots_per_row == 7
    # In eight bits: 80 bytes and a scale in 42 elements.
    narrow = shape.row_layout(torch.bfloat16, "fp8")
    assert narrow.fields["gate_up"] == (40 + 40 + 20 + 40 + 40, 42)
    assert narrow.widths == layout.widths
    assert narrow.width == 180 + 60 + 2 * 20
    assert narrow.slots_per_row == 6


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
