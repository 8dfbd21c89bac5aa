"""A whole step: version groups, micro-batches, revoked rows, the gate, and one SGD step from outside."""

import copy
import dataclasses
import itertools

import pytest
import torch
from engine_support import (
    VOCAB,
    Recorder,
    engine_of,
    naive_logps,
    naive_step,
    random_adapter,
    random_model,
    relative_error,
    with_peft,
)

from alchemist.trainer.lora import LoraAdapter, LoraConfig
from alchemist.trainer.optimizer import Optimizer, OptimizerConfig
from alchemist.trainer.rows import RowsRevoked
from alchemist.trainer.step import Objective, Sample, VersionGroup

KTO = Objective(name="kto", reference="base", beta=0.3)


def ids(n, generator):
    return torch.randint(0, VOCAB, (n,), generator=generator).tolist()


def make_samples(count, seed=0, shared=5):
    generator = torch.Generator().manual_seed(seed)
    head = ids(shared, generator)
    return [
        Sample(
            prompt_ids=head + ids(2 + i % 3, generator),
            response_ids=ids(1 + i % 4, generator),
            label=i % 3 != 1,
            weight=1.0 + 0.5 * (i % 2),
        )
        for i in range(count)
    ]


def recorded(recorder, model, adapter, samples, share=0.7, seed=0, answers=False):
    """The samples with a share of their prompts' tokens recorded; `answers`: and of their answers'."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [[*s.prompt_ids, *(s.response_ids[:-1] if answers else ())] for s in samples]
    masks = [torch.rand(len(t), generator=generator) < share for t in tokens]
    return [
        dataclasses.replace(s, recorded=recorder.record(model, adapter, t, mask))
        for s, t, mask in zip(samples, tokens, masks, strict=True)
    ]


@pytest.fixture(scope="module")
def model():
    return random_model("qwen3", torch.float64)


def groups_of(model, recorder, shape):
    """Three versions, the first of them v0 (B = 0), each with recorded samples."""
    zero = LoraAdapter.init(shape, LoraConfig(rank=3, alpha=5.0), 1).as_served(torch.float64)
    adapters = [
        zero,
        random_adapter(shape, torch.float64, 3),
        random_adapter(shape, torch.float64, 4),
    ]
    return [
        VersionGroup(a, recorded(recorder, model, a, make_samples(2 + i, seed=i)))
        for i, a in enumerate(adapters)
    ]


def paired(groups):
    """Neighbours in step order as preference pairs, some of one version, some of two."""
    numbers = itertools.count()

    def pair(sample):
        n = next(numbers)
        return dataclasses.replace(sample, label=n % 2 == 0, match=f"pair {n // 2}")

    samples = [[pair(s) for s in group.samples] for group in groups]
    samples[-1].pop()  # an odd one
    return [VersionGroup(g.adapter, s) for g, s in zip(groups, samples, strict=True)]


@pytest.mark.parametrize("max_tokens", [1 << 16, 20, 1])
@pytest.mark.parametrize(
    "objective",
    [
        KTO,
        Objective(name="sft"),
        Objective(name="apo_zero_unpaired", reference="served"),
        Objective(name="dpo", beta=0.3),
        Objective(name="dpo", beta=0.3, loss_type="ipo"),
        Objective(name="user_losses:hinge"),
    ],
    ids=lambda o: f"{o.name}-{o.loss_type}",
)
def test_mixed_versions_and_micro_batches_equal_the_naive_step(model, objective, max_tokens):
    engine = engine_of(model, max_tokens=max_tokens)
    recorder = Recorder(engine.shape, torch.float64)
    engine.view = recorder.view
    groups = groups_of(model, recorder, engine.shape)
    if objective.name == "dpo":
        groups = paired(groups)
    loss, grads, kl = naive_step(model, groups, objective)
    result = engine.step_gradients(groups, objective)
    assert result.loss == pytest.approx(loss, abs=1e-12)
    assert result.kl == pytest.approx(kl, abs=1e-12)
    assert relative_error(result.grads, grads) < 1e-10
    assert result.tokens_reused > 0


@pytest.mark.parametrize("name", ["sft", "kto", "apo_zero_unpaired"])
def test_a_completion_recorded_whole_needs_no_forward(model, name):
    """Log-probabilities and gradient from rows alone; only the KL estimate's other answers are computed."""
    engine = engine_of(model)
    recorder = Recorder(engine.shape, torch.float64)
    engine.view = recorder.view
    adapter = random_adapter(engine.shape, torch.float64, 3)
    samples = make_samples(4)
    objective = Objective(name=name, reference="served" if name == "sft" else "base", beta=0.3)
    expected = naive_step(model, [VersionGroup(adapter, samples)], objective)
    taken = recorded(recorder, model, adapter, samples, share=1.1, answers=True)
    result = engine.gradients(taken, adapter, objective)
    assert result.loss == pytest.approx(expected[0], abs=1e-12)
    assert relative_error(result.grads, expected[1]) < 1e-10
    others = sum(len(s.response_ids) - 1 for s in samples) if name == "kto" else 0
    assert result.tokens_recomputed <= others
    assert result.tokens_reused > 0


def test_the_kl_estimate_of_the_tests_is_not_clamped(model):
    engine = engine_of(model)
    recorder = Recorder(engine.shape, torch.float64)
    engine.view = recorder.view
    assert engine.step_gradients(groups_of(model, recorder, engine.shape), KTO).kl > 0.1


def test_a_completion_alone_has_no_kl_estimate(model):
    """With its own answer under its own prompt the estimate would be its reward."""
    engine = engine_of(model)
    adapter = random_adapter(engine.shape, torch.float64, 2)
    (sample,) = make_samples(1)
    result = engine.gradients([sample], adapter, KTO)
    assert result.samples[0].reward != 0
    assert result.kl == 0
    naive = naive_step(model, [VersionGroup(adapter, [sample])], KTO)
    assert relative_error(result.grads, naive[1]) < 1e-10


def test_rows_of_one_version_under_anothers_adapter_would_be_seen(model):
    engine = engine_of(model)
    recorder = Recorder(engine.shape, torch.float64)
    engine.view = recorder.view
    old, new = (random_adapter(engine.shape, torch.float64, seed) for seed in (2, 3))
    samples = recorded(recorder, model, old, make_samples(3))
    right = [VersionGroup(old, samples)]
    _, grads, _ = naive_step(model, right, KTO)
    assert relative_error(engine.step_gradients(right, KTO).grads, grads) < 1e-10
    wrong = engine.step_gradients([VersionGroup(new, samples)], KTO)
    assert relative_error(wrong.grads, grads) > 1e-3


def test_results_per_sample(model):
    engine = engine_of(model)
    adapter = random_adapter(engine.shape, torch.float64, 2)
    samples = make_samples(3)
    result = engine.gradients(samples, adapter, KTO)
    base = engine.score([s.pair for s in samples], None)
    for sample, found, reference in zip(samples, result.samples, base, strict=True):
        adapted = with_peft(model, adapter)
        with torch.no_grad():
            expected = naive_logps(adapted, sample.prompt_ids, sample.response_ids)
        adapted.unload()
        torch.testing.assert_close(found.logps, expected)
        reward = 0.3 * (float(expected.sum()) - float(reference.sum()))
        assert found.reward == pytest.approx(reward)
        assert found.reference_logp == pytest.approx(float(reference.sum()))
    chosen = [r.reward for s, r in zip(samples, result.samples, strict=True) if s.label]
    assert result.metrics["rewards/chosen"] == pytest.approx(sum(chosen) / len(chosen))
    assert result.loss == pytest.approx(sum(r.loss for r in result.samples) / 3)


def test_v0_needs_no_reference_forward(model):
    engine = engine_of(model)
    zero = LoraAdapter.init(engine.shape, LoraConfig(rank=3), 1).as_served(torch.float64)
    result = engine.gradients(make_samples(3), zero, KTO)
    assert result.tokens_reference == 0
    assert result.kl == 0
    assert all(r.reward == 0 for r in result.samples)


def test_sft_trains_up_votes_only(model):
    engine = engine_of(model)
    adapter = random_adapter(engine.shape, torch.float64, 2)
    samples = make_samples(5)
    sft = Objective(name="sft")
    both = engine.gradients(samples, adapter, sft)
    ups = engine.gradients([s for s in samples if s.label], adapter, sft)
    assert both.loss == pytest.approx(ups.loss)
    assert relative_error(both.grads, ups.grads) < 1e-12
    none = engine.gradients([s for s in samples if not s.label], adapter, sft)
    assert none.loss == 0
    assert not any(g.any() for g in none.grads.values())


@pytest.mark.parametrize("matches", [["", ""], ["a", "b"], ["a", "a", "a"], ["b", "a", "a"]])
def test_samples_that_are_no_pairs_are_refused(model, matches):
    engine = engine_of(model)
    samples = [
        Sample(prompt_ids=[1], response_ids=[2 + i], label=i % 2 == 0, match=match)
        for i, match in enumerate(matches)
    ]
    adapter = random_adapter(engine.shape, torch.float64, 3)
    with pytest.raises(ValueError, match="objective dpo wants pairs"):
        engine.gradients(samples, adapter, Objective(name="dpo"))


def test_two_pairs_of_equal_votes_are_refused(model):
    engine = engine_of(model)
    samples = [Sample(prompt_ids=[1], response_ids=[i], label=True, match="a") for i in (2, 3)]
    adapter = random_adapter(engine.shape, torch.float64, 3)
    with pytest.raises(ValueError, match="objective dpo wants pairs"):
        engine.gradients(samples, adapter, Objective(name="dpo"))


class RevokingGate:
    """Takes rows away at its n-th call, and lets others write where they and their tokens' keys and values were."""

    def __init__(self, at, recorder, rows, slots):
        self.left, self.recorder, self.rows, self.slots = at, recorder, rows, slots

    def __call__(self):
        self.left -= 1
        if self.left != 0:
            return
        recorder, nan = self.recorder, float("nan")
        on_device = self.rows < recorder.num_device
        taken = [recorder.cells[self.rows[on_device]].flatten(), self.slots[on_device]]
        recorder.gens[self.rows] += 1
        for host, k, v in zip(recorder.host, recorder.k, recorder.v, strict=True):
            host[self.rows[~on_device] - recorder.num_device] = nan
            for plane in (k, v):
                plane[torch.cat(taken)] = nan


class Recordings:
    """Three samples whose prompts are recorded whole, to be replayed from equal memory again and again."""

    def __init__(self, model, adapter, *, as_on_gpu, max_tokens=1 << 16):
        self.engine, self.adapter = engine_of(model, max_tokens=max_tokens), adapter
        self.as_on_gpu = as_on_gpu
        self.recorder = Recorder(self.engine.shape, torch.float64, num_rows=64)
        self.samples = recorded(self.recorder, model, adapter, make_samples(3), share=2)

    @property
    def own(self):
        """Of the second sample, which rows and slots hold the tokens that no other sample shares."""
        record = self.samples[1].recorded
        return record.rows[-3:], record.slots[-3:]

    def change(self, record):
        """Give the second sample this record."""
        self.samples[1] = dataclasses.replace(self.samples[1], recorded=record)

    def step(self, objective, gate=lambda recorder: lambda: None):
        """The step over a copy of the memory. `gate` makes the gate from the copy."""
        recorder = copy.deepcopy(self.recorder)
        self.engine.view = recorder.as_on_gpu() if self.as_on_gpu else recorder.view
        self.engine.gate = gate(recorder)
        return self.engine.gradients(self.samples, self.adapter, objective)


def assert_equal_logps(found, expected):
    for one, other in zip(found.samples, expected.samples, strict=True):
        assert torch.equal(one.logps, other.logps)
        assert one.reference_logp == other.reference_logp


def assert_equal_bits(found, expected):
    """Everything but times and counts."""
    assert_equal_logps(found, expected)
    assert (found.loss, found.kl, found.metrics) == (expected.loss, expected.kl, expected.metrics)
    assert found.grads.keys() == expected.grads.keys()
    assert all(torch.equal(found.grads[n], g) for n, g in expected.grads.items())


@pytest.mark.parametrize(
    ("objective", "max_tokens"),
    [(KTO, 1 << 16), (KTO, 12), (Objective(name="apo_zero_unpaired", beta=0.3), 12)],
    ids=["kto", "kto-split", "apo-split"],
)
@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_rows_revoked_at_any_gate_are_recomputed(model, objective, max_tokens, as_on_gpu):
    """As if they had never been recorded, bit by bit, or as if nothing had happened."""
    adapter = random_adapter(engine_of(model).shape, torch.float64, 2)
    loss, grads, _ = naive_step(model, [VersionGroup(adapter, make_samples(3))], objective)
    recordings = Recordings(model, adapter, as_on_gpu=as_on_gpu, max_tokens=max_tokens)
    rows, slots = recordings.own
    # On the device and on the host.
    assert 0 < int((rows < recordings.recorder.num_device).sum()) < rows.numel()
    before, record = recordings.step(objective), recordings.samples[1].recorded
    recordings.change(record.without(rows))
    after = recordings.step(objective)
    recordings.change(record)
    seen = 0
    for at in range(1, 100, 5):
        result = recordings.step(objective, lambda of, at=at: RevokingGate(at, of, rows, slots))
        assert relative_error(result.grads, grads) < 1e-10
        assert result.loss == pytest.approx(loss, abs=1e-12)
        assert result.rows_revoked in (0, rows.numel())
        expected = after if result.rows_revoked else before
        if max_tokens == 12 and result.kl != expected.kl:
            # Made for all micro-batches when the rows were still there; it enters the loss of each.
            assert result.kl == before.kl
            assert_equal_logps(result, expected)
        else:
            assert_equal_bits(result, expected)
        assert result.tokens_reused == expected.tokens_reused
        seen += result.rows_revoked > 0
    assert seen >= 6


@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_a_copy_on_the_host_takes_over_without_changing_a_bit(model, as_on_gpu):
    adapter = random_adapter(engine_of(model).shape, torch.float64, 2)
    recordings = Recordings(model, adapter, as_on_gpu=as_on_gpu)
    before, recorder = recordings.step(KTO), recordings.recorder
    record, prompt = recordings.samples[1].recorded, recordings.samples[1].prompt_ids
    copies = recorder.record(model, adapter, prompt, record.rows >= 0)
    on_host = torch.where(copies.rows >= recorder.num_device, copies.rows, -1)
    recordings.change(dataclasses.replace(record, hedge=(on_host, copies.gens)))
    (rows, slots), is_copied = recordings.own, on_host[-3:] >= 0
    assert is_copied.any()
    rows, slots = rows[is_copied], slots[is_copied]
    seen = 0
    for at in range(1, 100, 13):
        result = recordings.step(KTO, lambda of, at=at: RevokingGate(at, of, rows, slots))
        assert_equal_bits(result, before)
        assert result.tokens_reused == before.tokens_reused
        assert result.rows_revoked in (0, rows.numel())
        seen += result.rows_revoked > 0
    assert seen >= 3


def test_score_raises_when_rows_are_gone(model):
    engine = engine_of(model)
    recorder = Recorder(engine.shape, torch.float64)
    engine.view = recorder.view
    adapter = random_adapter(engine.shape, torch.float64, 2)
    (sample,) = recorded(recorder, model, adapter, make_samples(1), share=2)
    (before,) = engine.score([sample.pair], adapter)
    (replayed,) = engine.score([sample.pair], adapter, [sample.recorded])
    torch.testing.assert_close(before, replayed)
    recorder.gens += 1
    with pytest.raises(RowsRevoked):
        engine.score([sample.pair], adapter, [sample.recorded])


@pytest.mark.parametrize("objective", [KTO, Objective(name="sft")], ids=lambda o: o.name)
@pytest.mark.parametrize("as_on_gpu", [False, True])
@pytest.mark.parametrize(
    "taken",
    [
        None,
        {"share": 2},
        {"share": 2, "answers": True},
        {"share": 0.5},
        {"share": 0.5, "answers": True},
    ],
    ids=["nothing", "prompts", "answers too", "half of prompts", "half of answers too"],
)
def test_suspending_at_every_gate_changes_no_bit(model, objective, as_on_gpu, taken):
    calls = []

    def gate():
        calls.append(None)
        # Another tenant's work in between: different allocations, different autograd state.
        with torch.enable_grad():
            torch.randn(64, 64, requires_grad=True).pow(2).sum().backward()

    plain, gated = engine_of(model), engine_of(model, gate=gate)
    recorder = Recorder(plain.shape, torch.float64)
    plain.view, gated.view = (
        recorder.as_on_gpu() if as_on_gpu else recorder.view for _ in range(2)
    )
    adapter = random_adapter(plain.shape, torch.float64, 2)
    samples = make_samples(4)
    if taken is not None:
        samples = recorded(recorder, model, adapter, samples, **taken)
    a = plain.gradients(samples, adapter, objective)
    b = gated.gradients(samples, adapter, objective)
    layers = plain.shape.num_layers
    forwards = (a.tokens_recomputed > 0) + (a.tokens_reference > 0)
    # Forwards: at the boundary and between operations. Backward: at the boundary, between operations but in the MLP,
    # which does nothing yet, and on the way back, but where nothing of the first layer is differentiated.
    assert len(calls) == forwards * 7 * layers + (1 + 4 + 6) * layers - 1
    assert_equal_bits(a, b)
    assert (a.tokens_reused > 0) is (taken is not None)
    assert (a.tokens_reused, a.tokens_recomputed) == (b.tokens_reused, b.tokens_recomputed)


@pytest.mark.parametrize("name", ["sft", "kto"])
def test_one_sgd_step_equals_transformers_and_peft(name):
    """float32 end to end: rows from serving, one step, the adapter of an ordinary training step."""
    model = random_model("llama", torch.float32)
    engine = engine_of(model)
    recorder = Recorder(engine.shape, torch.float32)
    engine.view = recorder.view
    masters = random_adapter(engine.shape, torch.float32, 4).clone()
    before = masters.clone()
    objective = Objective(name=name, beta=0.3)
    samples = recorded(recorder, model, masters, make_samples(4))
    _, grads, _ = naive_step(model, [VersionGroup(before, samples)], objective)
    result = engine.gradients(samples, masters.as_served(torch.float32), objective)
    Optimizer(masters.weights, OptimizerConfig(name="sgd", learning_rate=0.5)).step(result.grads)
    for weight, tensor in masters.weights.items():
        expected = before.weights[weight] - 0.5 * grads[weight]
        moved = (expected - before.weights[weight]).norm()
        assert (tensor - expected).norm() <= 1e-4 * moved


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Objective(name="dpo2"),
        lambda: Objective(loss_type="hinge"),
        lambda: Objective(label_smoothing=0.5),
        lambda: Objective(reference="nobody"),
        lambda: Objective(beta=-1.0),
        lambda: Sample(prompt_ids=[], response_ids=[1], label=True),
        lambda: Sample(prompt_ids=[1], response_ids=[], label=True),
    ],
)
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError, match=r"is|empty"):
        bad()


def test_rows_of_other_tokens_are_found(model):
    """The first damaged row is named; one that has ended meanwhile is the step's affair, not damage."""
    engine = engine_of(model)
    recorder = Recorder(engine.shape, torch.float64)
    engine.view = recorder.view
    adapter = random_adapter(engine.shape, torch.float64, 2)
    (sample,) = recorded(recorder, model, adapter, make_samples(1, shared=9), share=0.7)
    assert engine.foreign_token(sample.prompt_ids, sample.recorded) is None
    held = torch.nonzero(sample.recorded.rows >= 0).flatten()
    assert 2 < held.numel() < len(sample.prompt_ids)
    other = [*sample.prompt_ids]
    other[held[1]] = (other[held[1]] + 1) % VOCAB
    assert engine.foreign_token(other, sample.recorded) == held[1]
    row = sample.recorded.rows[held[2]]
    recorder.damage(int(row))
    assert engine.foreign_token(sample.prompt_ids, sample.recorded) == held[2]
    recorder.gens[row] += 1
    assert engine.foreign_token(sample.prompt_ids, sample.recorded) is None
