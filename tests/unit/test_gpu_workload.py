"""What the GPU suite times and serves, without a GPU: the baseline computes what we do, and every token has a text."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from gpu_models import as_transformers, model_config, model_directory
from gpu_rows import MODELS
from gpu_workload import (
    OBJECTIVES,
    Batch,
    Model,
    PeftStep,
    make_samples,
    our_step,
    relative_error,
)

from alchemist.protocol.models import require_supported
from alchemist.trainer.families import ModelShape
from alchemist.trainer.weights import fused_from_hf

CPU = torch.device("cpu")
SPLIT = 20
"""Unique tokens of a micro-batch: so few that a step of two completions has two."""


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return Model(request.param, is_tiny=True, device=CPU, dtype=torch.float32, num_layers=2)


@pytest.fixture(scope="module")
def samples(model):
    return make_samples(model.shape.vocab_size, 2, 12, 5)


def test_the_baseline_is_over_the_same_memory(model):
    base = as_transformers(model.config, model.tensors)
    fused = fused_from_hf(base)
    assert all(torch.equal(fused[name], model.tensors[name]) for name in fused)
    qkv = model.tensors["model.layers.0.self_attn.qkv_proj.weight"]
    assert base.model.layers[0].self_attn.q_proj.weight.data_ptr() == qkv.data_ptr()


@pytest.mark.parametrize("objective", ["sft", "kto"])
def test_the_baselines_gradient_is_ours(model, samples, objective):
    batch = Batch(samples)
    ours = model.engine().step(batch.of(objective), OBJECTIVES[objective], None, SPLIT).grads
    theirs = PeftStep(model, samples, objective, checkpointing=False).gradient()
    assert set(theirs) == set(ours)
    # float32 sums in different orders.
    assert relative_error(theirs, ours) < 1e-4


def test_gradient_checkpointing_changes_nothing(model, samples):
    plain = PeftStep(model, samples, "sft", checkpointing=False).gradient()
    again = PeftStep(model, samples, "sft", checkpointing=True).gradient()
    assert relative_error(again, plain) < 1e-6


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_recorded_rows_give_the_same_gradient(model, samples, objective):
    ours = model.engine()
    recorded, view = ours.record(samples)
    batch = Batch(recorded, view)
    found = ours.step(batch.of(objective), OBJECTIVES[objective], view, SPLIT)
    plain = ours.step(Batch(samples).of(objective), OBJECTIVES[objective], None, SPLIT)
    assert found.tokens_reused > 0
    assert plain.tokens_reused == 0
    assert relative_error(found.grads, plain.grads) < 1e-5


def test_a_step_moves_masters_and_not_what_has_served(model, samples):
    before = {name: t.clone() for name, t in model.served.weights.items()}
    our_step(model, model.engine(), Batch(samples), "sft", SPLIT)()
    assert all(torch.equal(model.served.weights[name], t) for name, t in before.items())


def test_sft_learns_from_all_of_a_batch(samples):
    assert [s.label for s in samples] == [True, False]
    assert [s.label for s in Batch(samples).of("sft")] == [True, True]
    assert Batch(samples).of("kto") == samples
    first, second = Batch(samples).of("dpo")
    assert first.match == second.match
    assert first.prompt_ids == second.prompt_ids


@pytest.mark.parametrize(("key", "billions"), [("qwen3_8b", 8.19), ("llama31_8b", 8.03)])
def test_models_have_their_true_size(key, billions):
    config = model_config(key, is_tiny=False)
    require_supported(config)
    ModelShape.from_config(config)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert empty.num_parameters() / 1e9 == pytest.approx(billions, abs=0.01)


def test_every_token_of_a_served_model_has_a_text(tmp_path):
    path = model_directory("llama31_8b", tmp_path, is_tiny=False)
    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert config.architectures == ["LlamaForCausalLM"]
    assert len(tokenizer) == config.vocab_size == 128_256
    ids = [0, 1, 77, config.vocab_size - 1]
    assert tokenizer.decode(ids) == f"t0 t1 t77 t{config.vocab_size - 1}"
    assert tokenizer("t77 t1")["input_ids"] == [77, 1]
    # Made once.
    assert model_directory("llama31_8b", tmp_path, is_tiny=False) == path
