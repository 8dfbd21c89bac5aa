"""The replayed gradient is the gradient: every family, objective and availability mask, against autograd alone."""

import dataclasses

import pytest
import torch
from engine_support import (
    FAMILIES,
    Recorder,
    branching_samples,
    engine_of,
    naive_step,
    random_adapter,
    random_model,
    relative_error,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alchemist.trainer.lora import MODULES, LoraAdapter, LoraConfig
from alchemist.trainer.step import Objective, Sample, VersionGroup

# Errors relative to the gradient's largest element. Sums here have at most a few hundred terms.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
OBJECTIVES = [
    Objective(name="sft"),
    Objective(name="kto", beta=0.4, desirable_weight=1.2),
    Objective(name="kto", beta=0.4, reference="served"),
    Objective(name="apo_zero_unpaired", beta=0.4, undesirable_weight=0.6),
    Objective(name="dpo", beta=0.4, label_smoothing=0.1),
    Objective(name="dpo", beta=0.4, loss_type="robust", label_smoothing=0.2, reference="served"),
    Objective(name="dpo", beta=0.4, loss_type="ipo"),
    Objective(name="user_losses:hinge"),
]


@st.composite
def trees(draw):
    """Samples that share prefixes of any length, equal prompts and equal completions included."""
    token = st.integers(0, 2)
    trunk = draw(st.lists(token, min_size=0, max_size=6))
    samples = []
    for _ in range(draw(st.integers(1, 4))):
        shared = trunk[: draw(st.integers(0, len(trunk)))]
        own = draw(st.lists(token, min_size=0 if shared else 1, max_size=4))
        samples.append(
            Sample(
                prompt_ids=shared + own,
                response_ids=draw(st.lists(token, min_size=1, max_size=4)),
                label=draw(st.booleans()),
                weight=draw(st.sampled_from([1.0, 0.5])),
            )
        )
    return samples


def as_pairs(samples):
    """Each sample, and after it one with the other vote on the same prompt."""
    pairs = []
    for i, sample in enumerate(samples):
        other = [1, *sample.response_ids[:2]]
        pairs += [
            dataclasses.replace(sample, match=f"pair {i}"),
            dataclasses.replace(
                sample, match=f"pair {i}", label=not sample.label, response_ids=other
            ),
        ]
    return pairs


def served(sample):
    """What serving computes of a sample, so what it may record: all but the response's last token."""
    return [*sample.prompt_ids, *sample.response_ids[:-1]]


def compare(model, samples, adapter, objective, masks, limit, max_tokens=1 << 16):
    if objective.name == "dpo":
        n = [len(s.prompt_ids) for s in samples]
        masks = [m for i, mask in enumerate(masks) for m in (mask, ~mask[: n[i]])]
        samples = as_pairs(samples)
    engine = engine_of(model, max_tokens=max_tokens)
    dtype = next(model.parameters()).dtype
    recorder = Recorder(engine.shape, dtype)
    engine.view = recorder.view
    group = VersionGroup(adapter, samples)
    loss, grads, kl = naive_step(model, [group], objective)
    taken = [
        dataclasses.replace(
            s, recorded=recorder.record(model, adapter, served(s)[: mask.numel()], mask)
        )
        for s, mask in zip(samples, masks, strict=True)
    ]
    result = engine.gradients(taken, adapter, objective)
    assert result.loss == pytest.approx(loss, rel=limit, abs=limit)
    assert result.kl == pytest.approx(kl, rel=limit, abs=100 * limit)
    if not grads:
        assert not any(g.any() for g in result.grads.values())
        return
    assert relative_error(result.grads, grads) < limit


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_tree_any_mask_any_objective(family, data):
    model = random_model(family, torch.float64)
    samples = data.draw(trees())
    objective = data.draw(st.sampled_from(OBJECTIVES))
    modules = data.draw(st.sets(st.sampled_from(MODULES), min_size=1))
    config = LoraConfig(rank=2, alpha=3.0, target_modules=tuple(m for m in MODULES if m in modules))
    shape = engine_of(model).shape
    if data.draw(st.booleans()):
        adapter = random_adapter(shape, torch.float64, 3, config)
    else:
        adapter = LoraAdapter.init(shape, config, 3).as_served(torch.float64)
    # Of prompts alone, or of prompts and answers.
    lengths = [data.draw(st.sampled_from([len(s.prompt_ids), len(served(s))])) for s in samples]
    masks = [
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in lengths
    ]
    max_tokens = data.draw(st.sampled_from([1 << 16, 9, 1]))
    compare(model, samples, adapter, objective, masks, LIMITS[torch.float64], max_tokens)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=lambda o: f"{o.name}-{o.loss_type}-{o.reference}"
)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_none_and_half_recorded(family, objective, share, dtype):
    model = random_model(family, dtype)
    samples = branching_samples(3, own=3)
    adapter = random_adapter(engine_of(model).shape, dtype, 3)
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(len(s.prompt_ids), generator=generator) < share for s in samples]
    compare(model, samples, adapter, objective, masks, LIMITS[dtype])
