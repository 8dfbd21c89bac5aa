"""The replayed gradient is the gradient: every family, objective and availability mask, against autograd alone."""

import contextlib
import dataclasses

import pytest
import torch
from engine_support import (
    FAMILIES,
    VOCAB,
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

from alchemist.kernels import dispatch, linear_logprob
from alchemist.kernels.path_attention import cpu as cpu_attention
from alchemist.trainer.lora import MODULES, LoraAdapter, LoraConfig
from alchemist.trainer.step import Objective, Sample, VersionGroup

# Errors relative to the gradient's largest element. Sums here have at most a few hundred terms.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
KTO = Objective(name="kto", beta=0.4, desirable_weight=1.2)
OBJECTIVES = [
    Objective(name="sft"),
    KTO,
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


@contextlib.contextmanager
def sizes(tile=cpu_attention.TILE, block=None, heads=1 << 16):
    """Where the kernels cut: queries a tile, columns and rows a block of a product (then every factor is large), heads
    (of float64) a chunk of logits.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "TILE", tile)
        if block is not None:
            patch.setattr(dispatch, "LARGE", 0)
            patch.setattr(dispatch, "_by_blocks_is_faster", {})
            patch.setattr(dispatch, "by_blocks_is_faster", lambda a, b: True)
            patch.setattr(dispatch, "COLUMNS", block[0])
            patch.setattr(dispatch, "ROWS", block[1])
        patch.setattr(linear_logprob, "CHUNK_BYTES", heads * VOCAB * 8)
        yield


def compare(model, versions, objective, limit, *, max_tokens=1 << 16, as_on_gpu=False):
    """A step's loss, KL estimate and gradient against the naive ones.

    Args:
        versions: of each its adapter, and its samples with masks of what is recorded of their first tokens.
    """
    engine = engine_of(model, max_tokens=max_tokens)
    dtype = next(model.parameters()).dtype
    recorder = Recorder(engine.shape, dtype)
    engine.view = recorder.as_on_gpu() if as_on_gpu else recorder.view
    plain = [VersionGroup(adapter, [sample for sample, _ in own]) for adapter, own in versions]
    loss, grads, kl = naive_step(model, plain, objective)

    def take(adapter, sample, mask):
        rows = recorder.record(model, adapter, served(sample)[: mask.numel()], mask)
        return dataclasses.replace(sample, recorded=rows)

    groups = [
        VersionGroup(adapter, [take(adapter, *one) for one in own]) for adapter, own in versions
    ]
    result = engine.step_gradients(groups, objective)
    assert result.loss == pytest.approx(loss, rel=limit, abs=limit)
    assert result.kl == pytest.approx(kl, rel=limit, abs=100 * limit)
    if grads:
        assert relative_error(result.grads, grads) < limit
    else:
        assert not any(g.any() for g in result.grads.values())
    return result


def draw_adapters(data, shape):
    """One to three versions of the same masters; one of them may be v0, which is the base."""
    modules = data.draw(st.sets(st.sampled_from(MODULES), min_size=1))
    config = LoraConfig(rank=2, alpha=3.0, target_modules=tuple(m for m in MODULES if m in modules))
    adapters = [
        random_adapter(shape, torch.float64, 3 + 10 * i, config)
        for i in range(data.draw(st.integers(1, 3)))
    ]
    zero = data.draw(st.integers(-1, len(adapters) - 1))
    if zero >= 0:
        adapters[zero] = LoraAdapter.init(shape, config, 3).as_served(torch.float64)
    return adapters


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_tree_any_versions_any_mask_any_objective(family, data):
    model = random_model(family, torch.float64)
    samples = data.draw(trees())
    objective = data.draw(st.sampled_from(OBJECTIVES))
    if objective.name == "dpo":
        samples = as_pairs(samples)
    adapters = draw_adapters(data, engine_of(model).shape)
    # The two of a pair are of one version or of two.
    members = [[] for _ in adapters]
    for sample in samples:
        # Of the prompt alone, or of prompt and answer.
        n = data.draw(st.sampled_from([len(sample.prompt_ids), len(served(sample))]))
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
        members[data.draw(st.integers(0, len(adapters) - 1))].append((sample, mask))
    versions = [(a, own) for a, own in zip(adapters, members, strict=True) if own]
    options = {
        "max_tokens": data.draw(st.sampled_from([1 << 16, 9, 1])),
        "as_on_gpu": data.draw(st.booleans()),
    }
    cuts = {
        "tile": data.draw(st.sampled_from([64, 1, 2, 3])),
        "block": data.draw(st.sampled_from([None, (1, 2), (3, 5), (7, 512)])),
        "heads": data.draw(st.sampled_from([1 << 16, 1, 2, 3])),
    }
    with sizes(**cuts):
        compare(model, versions, objective, LIMITS[torch.float64], **options)


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
    if objective.name == "dpo":
        samples, masks = as_pairs(samples), [m for mask in masks for m in (mask, ~mask)]
    versions = [(adapter, list(zip(samples, masks, strict=True)))]
    compare(model, versions, objective, LIMITS[dtype])


@pytest.mark.parametrize(
    "cuts",
    [
        {"tile": 1, "block": (1, 3), "heads": 1},
        {"tile": 2, "block": (5, 4)},
        {"tile": 3, "heads": 2},
        {"block": (7, 9), "heads": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_wherever_the_kernels_cut(family, cuts):
    """Blocks of several tiles, layers on both sides of what is few, a last chunk that is not full."""
    model = random_model(family, torch.float64)
    adapter = random_adapter(engine_of(model).shape, torch.float64, 3)
    generator = torch.Generator().manual_seed(2)
    own = [
        (sample, torch.rand(len(served(sample)), generator=generator) < 0.3)
        for sample in branching_samples(3, own=3)
    ]
    with sizes(**cuts):
        compare(model, [(adapter, own)], KTO, LIMITS[torch.float64])


@pytest.mark.parametrize("share", [0.15, 0.85])
@pytest.mark.parametrize("family", FAMILIES)
def test_long_completions_of_one_conversation(family, share):
    """Several tiles a block and, where little is recorded, more tokens than are few; positions in the hundreds."""
    model = random_model(family, torch.float64, max_position_embeddings=512)
    adapter = random_adapter(engine_of(model).shape, torch.float64, 3)
    generator = torch.Generator().manual_seed(4)

    def ids(n):
        return torch.randint(0, VOCAB, (n,), generator=generator).tolist()

    shared = ids(150)
    samples = [
        Sample(prompt_ids=shared + ids(250), response_ids=ids(20), label=label)
        for label in (True, False)
    ]
    # Of one sample the prompt alone, of the other one the answer, too.
    lengths = [len(samples[0].prompt_ids), len(served(samples[1]))]
    masks = [torch.rand(n, generator=generator) < share for n in lengths]
    with sizes(block=(5, 512), heads=7):
        versions = [(adapter, list(zip(samples, masks, strict=True)))]
        result = compare(model, versions, KTO, LIMITS[torch.float64])
    assert result.tokens_reused > cpu_attention.TILE
    assert (result.tokens_recomputed > 512) is (share < 0.5)
