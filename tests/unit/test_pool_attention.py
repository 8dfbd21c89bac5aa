"""Attention that reads recorded keys where they lie: how a plan is divided, how the parts are put together, what
FlashInfer is asked, and the whole step on it, with the reference attention in the kernels' place.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
import types

import pytest
import torch
from engine_support import (
    Recorder,
    branching_samples,
    engine_of,
    naive_step,
    random_adapter,
    random_model,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_accuracy import Bench, tree_plan

from alchemist.kernels.path_attention import PathBlock, flashinfer, paged, reference
from alchemist.trainer import replay
from alchemist.trainer.rows import RowsRevoked
from alchemist.trainer.step import Objective, VersionGroup

REFERENCE = paged.Kernels(reference.over_pool, reference.path_attention_and_lse)
NUM_SLOTS = 200


@st.composite
def cases(draw):
    """A plan over a tree, the numbers of its queries and keys, and of every key its slot, −1: given."""
    nodes = [(-1, draw(st.integers(1, 9)))]
    for number in range(1, draw(st.integers(1, 6))):
        nodes.append((draw(st.integers(-1, number - 1)), draw(st.integers(1, 9))))
    bench = Bench("cpu", torch.float64, is_small=True)
    share = draw(st.sampled_from([0.2, 0.6]))
    plan, num_queries, num_keys = tree_plan(bench, nodes, share)
    of_queries = {int(k) for block in plan for k in block.keys[block.depths]}
    pooled = draw(st.sampled_from([0.0, 0.5, 1.0]))
    slots = bench.permutation(NUM_SLOTS)[:num_keys]
    for key in range(num_keys):
        if key in of_queries or bench.permutation(100)[0] >= 100 * pooled:
            slots[key] = -1
    return bench, plan, num_queries, num_keys, slots


def random_tensors(bench, num_queries, num_keys, slots):
    """q, k, v; and k, v as they are given and in a pool that holds nothing else."""
    q = bench.random(num_queries, 4, 8)
    k, v = bench.random(num_keys, 2, 8), bench.random(num_keys, 2, 8)
    pools = []
    for tensor in (k, v):
        pool = torch.full((NUM_SLOTS, 2, 8), math.nan, dtype=tensor.dtype)
        pool[slots[slots >= 0]] = tensor[slots >= 0]
        pools.append(pool)
    return (q, k, v), (k[slots < 0], v[slots < 0], *pools)


@given(cases())
@settings(deadline=None)
def test_both_parts_together_are_the_attention(case):
    bench, plan, num_queries, num_keys, slots = case
    if not plan:
        return
    whole, parts = random_tensors(bench, num_queries, num_keys, slots)
    expected = reference.path_attention(*whole, plan)
    found = paged.attention(whole[0], *parts, paged.split(plan, slots), REFERENCE)
    assert float((found - expected).abs().max()) < 1e-10


@given(cases())
@settings(deadline=None)
def test_every_key_that_a_query_sees_is_in_one_of_the_parts(case):
    _, plan, num_queries, _, slots = case
    found = paged.split(plan, slots)
    of_slot = {int(slot): key for key, slot in enumerate(slots) if slot >= 0}
    given_keys = torch.where(slots < 0)[0].tolist()
    seen = {query: [] for query in range(num_queries)}
    rows = torch.arange(num_queries)[found.rows].tolist()
    ends = list(itertools.accumulate(found.num_queries))
    tables = found.slots.split(found.num_slots) if found.num_slots else []
    for end, count, table in zip(ends, found.num_queries, tables, strict=True):
        for query in rows[end - count : end]:
            seen[query] += [of_slot[slot] for slot in table.tolist()]
    assert all(table.numel() for table in tables)
    for block in found.given:
        for query, depth in zip(block.queries.tolist(), block.depths.tolist(), strict=True):
            seen[query] += [given_keys[row] for row in block.keys[: depth + 1].tolist()]
    for block in plan:
        for query, depth in zip(block.queries.tolist(), block.depths.tolist(), strict=True):
            assert sorted(seen.pop(query)) == sorted(block.keys[: depth + 1].tolist())
    assert not seen


def chain(num_keys, is_query):
    """One path, whose tokens that are queries are the given ones."""
    (depths,) = torch.where(is_query)
    keys = torch.arange(int(depths[-1]) + 1)
    slots = torch.where(is_query, -1, torch.arange(num_keys) + 5)
    return [PathBlock(torch.arange(depths.numel()), depths, keys)], slots


def test_a_recorded_prompt_and_its_answer_are_one_request_and_take_no_gather():
    plan, slots = chain(9, torch.arange(9) >= 6)
    found = paged.split(plan, slots)
    assert (found.rows, found.num_queries, found.num_slots) == (slice(0, 3), [3], [6])
    assert found.slots.tolist() == [5, 6, 7, 8, 9, 10]
    assert paged.is_worth(found, plan)


def test_a_pool_that_would_be_read_for_every_query_again_is_not_worth_it():
    plan, slots = chain(40, torch.arange(40) % 2 == 1)
    found = paged.split(plan, slots)
    assert found.num_queries == [1] * 20
    assert not paged.is_worth(found, plan)
    nothing = paged.split(plan, torch.full_like(slots, -1))
    assert (nothing.rows, nothing.num_queries) == (slice(0, 0), [])
    assert not paged.is_worth(nothing, plan)


def test_a_query_in_the_pool_is_refused():
    plan, slots = chain(9, torch.arange(9) >= 6)
    slots[7] = 3
    with pytest.raises(ValueError, match="own key is in the pool"):
        paged.split(plan, slots)


@pytest.mark.parametrize("gap", [-math.inf, -800.0, -1.0, 0.0, 30.0, 800.0])
def test_parts_are_weighed_by_their_sums_however_far_these_are_apart(gap):
    out, other = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    lse = torch.full((3, 4), 600.0, dtype=torch.float64)
    weights = torch.softmax(torch.tensor([0.0, gap], dtype=torch.float64), 0)
    expected = weights[0] * out + weights[1] * other
    paged.merge_(out, lse, other, lse + gap)
    assert float((out - expected).abs().max()) < 1e-12


def test_narrow_outputs_are_put_together_wide():
    out, other = torch.randn(2, 50, 4, 8).bfloat16()
    lse, other_lse = torch.randn(2, 50, 4)
    weights = torch.softmax(torch.stack([lse, other_lse]), 0)[..., None]
    expected = (weights[0] * out.float() + weights[1] * other.float()).bfloat16()
    paged.merge_(out, lse, other, other_lse)
    # A rounding at most, where the sum in float32 lies between two numbers.
    assert float((out != expected).float().mean()) < 0.01


class CountedKernels:
    """The reference, counting what was read of the pool; `meanwhile` is called after each reading."""

    def __init__(self, meanwhile=lambda count: None):
        self.calls, self._meanwhile = 0, meanwhile

    def __call__(self, dtype, k_pool, v_pool):
        return paged.Kernels(self._over_pool, reference.path_attention_and_lse)

    def _over_pool(self, q, k_pool, v_pool, plan):
        found = reference.over_pool(q, k_pool, v_pool, plan)
        self.calls += 1
        self._meanwhile(self.calls)
        return found


def recorded_step(model, objective, lengths, *, in_pool_only=False):
    """An engine over rows as on a GPU, its samples with the first `lengths` tokens recorded, and the naive loss and
    gradient.

    Args:
        in_pool_only: no row is on the host.
    """
    engine = engine_of(model)
    recorder = Recorder(engine.shape, torch.float64)
    if in_pool_only:
        recorder._free_rows = recorder._free_rows[recorder._free_rows < recorder.num_device]
    engine.view = recorder.as_on_gpu()
    adapter = random_adapter(engine.shape, torch.float64, 3)
    samples = branching_samples(len(lengths), own=4)
    loss, grads, _ = naive_step(model, [VersionGroup(adapter, samples)], objective)
    recorded = []
    for sample, length in zip(samples, lengths, strict=True):
        mask = torch.arange(len(sample.prompt_ids)) < length
        # One in the middle is missing, too.
        mask[2] = False
        rows = recorder.record(model, adapter, sample.prompt_ids, mask)
        recorded.append(dataclasses.replace(sample, recorded=rows))
    return engine, recorder, [VersionGroup(adapter, recorded)], loss, grads


@pytest.mark.parametrize(
    ("family", "objective", "in_pool_only"),
    [("llama", "sft", False), ("qwen3", "kto", False), ("qwen3", "sft", True)],
)
def test_the_whole_step_is_the_same_step(family, objective, in_pool_only, monkeypatch):
    model = random_model(family, torch.float64)
    chosen = Objective(name=objective, beta=0.4)
    lengths = [13, 13, 6, 0]
    engine, _, groups, loss, grads = recorded_step(
        model, chosen, lengths, in_pool_only=in_pool_only
    )
    copied = engine.step_gradients(groups, chosen)
    kernels = CountedKernels()
    monkeypatch.setattr(replay, "ATTEND_IN_POOL", True)
    monkeypatch.setattr(paged, "kernels", kernels)
    found = engine.step_gradients(groups, chosen)
    assert kernels.calls >= engine.shape.num_layers
    assert found.loss == pytest.approx(loss, rel=1e-10)
    assert relative_error(found.grads, copied.grads) < 1e-10
    assert relative_error(found.grads, grads) < 1e-10
    assert found.tokens_reused == copied.tokens_reused > 0


@pytest.mark.parametrize("layer", [1, 3])
def test_rows_that_are_overwritten_while_they_are_read_are_found(layer, monkeypatch):
    """In the first layer and in the last: the pool's memory is serving's again."""
    model = random_model("llama", torch.float64)
    objective = Objective(name="sft")
    # Nothing is copied and no recorded token predicts, so no check but attention's own finds it in a forward.
    engine, recorder, groups, loss, grads = recorded_step(
        model, objective, [12, 12, 6, 0], in_pool_only=True
    )
    samples, adapter = groups[0].samples, groups[0].adapter
    row, slot = (int(t[11]) for t in (samples[0].recorded.rows, samples[0].recorded.slots))

    def take_away(count):
        if count == layer:
            recorder.gens[row] += 1
            for pool in (*recorder.k, *recorder.v):
                pool[slot] = math.nan

    monkeypatch.setattr(replay, "ATTEND_IN_POOL", True)
    monkeypatch.setattr(paged, "kernels", CountedKernels(take_away))
    with pytest.raises(RowsRevoked) as error:
        engine.score([s.pair for s in samples], adapter, [s.recorded for s in samples])
    assert error.value.rows == [row]
    # A step computes them.
    found = engine.step_gradients(groups, objective)
    assert found.rows_revoked == 1
    assert found.loss == pytest.approx(loss, rel=1e-10)
    assert relative_error(found.grads, grads) < 1e-10


def test_it_is_off_and_without_flashinfer_copies_are_made(monkeypatch):
    assert replay.ATTEND_IN_POOL is False
    monkeypatch.setattr(replay, "ATTEND_IN_POOL", True)
    model = random_model("llama", torch.float64)
    objective = Objective(name="sft")
    engine, _, groups, loss, _ = recorded_step(model, objective, [13, 13, 6, 0])
    # Nothing can read a pool on the CPU.
    assert paged.kernels(torch.float64, *engine.view.pool(0)) is None
    assert engine.step_gradients(groups, objective).loss == pytest.approx(loss, rel=1e-10)


class OnGpu:
    """What is asked of a pool's tensor before it is read."""

    is_cuda = True

    def __init__(self, dtype=torch.bfloat16, dim=128, stride=None):
        self.dtype, self.shape = dtype, (100, 8, dim)
        self._stride = stride or (8 * dim, dim, 1)

    def stride(self, dim=None):
        return self._stride if dim is None else self._stride[dim]


@pytest.mark.parametrize(
    ("dtype", "k", "v", "expected"),
    [
        (torch.bfloat16, OnGpu(), OnGpu(), True),
        (torch.float16, OnGpu(torch.float16, 64), OnGpu(torch.float16, 64), True),
        (torch.float32, OnGpu(torch.float32), OnGpu(torch.float32), False),
        # A narrower KV cache.
        (torch.bfloat16, OnGpu(torch.float8_e4m3fn), OnGpu(torch.float8_e4m3fn), False),
        (torch.bfloat16, OnGpu(torch.uint8), OnGpu(torch.uint8), False),
        (torch.bfloat16, OnGpu(dim=80), OnGpu(dim=80), False),
        (torch.bfloat16, OnGpu(), OnGpu(stride=(4096, 128, 1)), False),
    ],
)
def test_which_pools_flashinfer_is_given(dtype, k, v, expected, monkeypatch):
    monkeypatch.setattr(flashinfer, "is_available", lambda: True)
    assert flashinfer.can_read(dtype, k, v) is expected
    monkeypatch.setattr(flashinfer, "is_available", lambda: False)
    assert not flashinfer.can_read(dtype, k, v)


class Wrapper:
    """FlashInfer 0.6.15's wrapper as its sources have it, in plain torch: names of arguments, tables of pages, where
    the causal mask ends, and the base of the log-sum-exp.
    """

    plans = 0

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None,
        packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
        o_data_type=None, non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None,
        token_pos_in_items_len=0, max_item_len_ptr=None, seq_lens=None, seq_lens_q=None,
        block_tables=None, max_token_per_sequence=None, max_sequence_kv=None,
        fixed_split_size=None, disable_split_kv=False,
    ):  # fmt: skip
        Wrapper.plans += 1
        tables = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(table.dtype == torch.int32 for table in tables)
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert (page_size, paged_kv_last_page_len.unique().tolist()) == (1, [1])
        assert max_token_per_sequence == int(qo_indptr.diff().max())
        assert int(paged_kv_indptr.diff().min()) > 0
        self.heads, self.dtypes = (num_qo_heads, num_kv_heads), (q_data_type, kv_data_type)
        self.qo, self.kv, self.pages = qo_indptr, paged_kv_indptr, paged_kv_indices.long()
        self.causal = causal

    def run(self, q, paged_kv_cache, *, return_lse=False):
        keys, values = paged_kv_cache
        assert keys.shape[1] == 1
        assert (q.shape[0], q.shape[1], keys.shape[2]) == (int(self.qo[-1]), *self.heads)
        assert (q.dtype, keys.dtype) == self.dtypes
        outs, lses = [], []
        for i in range(len(self.qo) - 1):
            part = q[self.qo[i] : self.qo[i + 1]]
            rows = self.pages[self.kv[i] : self.kv[i + 1]]
            for j, query in enumerate(part):
                # The last query sees the last key.
                end = len(rows) - (len(part) - 1 - j if self.causal else 0)
                out, lse = reference._attend(query, keys[:, 0], values[:, 0], rows[:end])
                outs.append(out)
                lses.append(lse / math.log(2))
        out, lse = torch.stack(outs), torch.stack(lses)
        return (out, lse) if return_lse else out


@contextlib.contextmanager
def in_flashinfers_place():
    event = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    module = types.SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", module)
        patch.setattr(flashinfer, "_kept", [])
        patch.setattr(flashinfer, "_workspace", lambda q, k: torch.empty(0, dtype=torch.uint8))
        patch.setattr(torch.cuda, "Event", lambda: event)
        patch.setattr(Wrapper, "plans", 0)
        yield


@given(cases())
@settings(deadline=None)
def test_what_flashinfer_is_asked_is_what_the_plan_means(case):
    bench, plan, num_queries, num_keys, slots = case
    if not plan:
        return
    whole, parts = random_tensors(bench, num_queries, num_keys, slots)
    expected = reference.path_attention(*whole, plan)
    kernels = paged.Kernels(flashinfer.over_pool, reference.path_attention_and_lse)
    divided = paged.split(plan, slots)
    with in_flashinfers_place():
        for _ in range(2):
            found = paged.attention(whole[0], *parts, divided, kernels)
            assert float((found - expected).abs().max()) < 1e-10
        # Planned once, for all layers.
        assert Wrapper.plans == (1 if divided.num_queries else 0)
        assert float((flashinfer.forward(*whole, plan) - expected).abs().max()) < 1e-10
