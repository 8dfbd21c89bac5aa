"""The Triton kernels in Triton's interpreter, on CPU tensors of small shapes, held to the same bar as on a GPU; and the
tables that attention's kernels read.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_accuracy import CASES, Bench, measure, tree_plan

from alchemist.kernels.path_attention import PathBlock, flashinfer
from alchemist.kernels.path_attention.packing import pack

# Left to the GPU: products of matrices are cuBLAS's; and the interpreter rounds to e4m3 wrongly, for it loses the carry
# out of the mantissa.
NAMES = [name for name in CASES if name not in ("linears", "mlps", "eight_bits")]
PROGRAM = Path(__file__).parents[1] / "kernel_accuracy.py"


def in_interpreter(*command):
    # A process of its own: what Triton is, is decided when it is imported.
    run = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def interpreted(dtype, names):
    lines = in_interpreter(
        str(PROGRAM), "--device=cpu", f"--dtype={dtype}", f"--only={','.join(names)}"
    )
    return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def comparisons():
    return interpreted("float32", NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_error_is_that_of_plain_torch(name, comparisons):
    """On a CPU what plain PyTorch rounds, and whether at all, depends on the processor's own kernels: it is allowed to
    be half as exact again here, and a few roundings of numbers around one. A wrong kernel is off by far more.
    """
    mine = [found for found in comparisons if found["name"] == name]
    assert mine
    eps = torch.finfo(torch.float32).eps
    bad = [
        found
        for found in mine
        if found["max_error"] > 1.5 * found["max_allowed"] + 4 * eps
        or found["rms_error"] > 1.5 * found["rms_allowed"] + 2 * eps
    ]
    assert not bad, "\n".join(map(str, bad))


def test_rows_of_16_bits_keep_their_bits():
    found = interpreted("bfloat16", ["packed_rows"])
    assert found
    assert all(comparison["ok"] for comparison in found)


def test_the_whole_engine_runs_on_them():
    """Its gradients against autograd alone, half of the prompts recorded: cases of the property tests."""
    tests = Path(__file__).parents[1] / "property" / "test_replay_gradients.py"
    chosen = "float32 and 0.5 and (llama or qwen3) and sft"
    output = in_interpreter(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", chosen
    )
    assert "2 passed" in output


def test_the_bar_can_be_missed():
    truth = torch.randn(1000, dtype=torch.float64)
    plain = truth.float() + 1e-6 * torch.randn(1000)
    assert measure("", "", plain, plain, truth).ok
    assert not measure("", "", plain + 5e-6, plain, truth).ok
    one_wrong = plain.clone()
    one_wrong[3] += 2e-5
    assert not measure("", "", one_wrong, plain, truth).ok
    one_wrong[3] = float("nan")
    assert not measure("", "", one_wrong, plain, truth).ok


@st.composite
def trees(draw):
    nodes = [(-1, draw(st.integers(1, 9)))]
    for number in range(1, draw(st.integers(1, 7))):
        nodes.append((draw(st.integers(-1, number - 1)), draw(st.integers(1, 9))))
    return nodes


@given(trees(), st.sampled_from([0.2, 0.6, 1.0]), st.integers(1, 5), st.integers(1, 5))
@settings(deadline=None)
def test_tiles_hold_every_query_and_key_once_and_every_pair_is_in_a_span(
    nodes, share, q_size, k_size
):
    plan, num_queries, num_keys = tree_plan(
        Bench("cpu", torch.float32, is_small=True), nodes, share
    )
    if not plan:
        return
    table = pack(plan, q_size, k_size)
    q_rows, depths, key_rows = (t.tolist() for t in table[:3])
    expected = {
        (query, key)
        for block in plan
        for query, depth in zip(block.queries.tolist(), block.depths.tolist(), strict=True)
        for key in block.keys[: depth + 1].tolist()
    }

    of_queries = [
        (q_rows[i], key)
        for first, end, path in table.q_tiles.tolist()
        for i in range(first, end)
        for key in key_rows[path : path + depths[i] + 1]
    ]
    assert len(of_queries) == len(expected)
    assert set(of_queries) == expected
    assert all(0 < end - first <= q_size for first, end, _ in table.q_tiles.tolist())

    of_keys, seen, spans = [], [], table.spans.tolist()
    for begin, count, depth, first_span, num_spans in table.k_tiles.tolist():
        assert 0 < count <= k_size
        seen += key_rows[begin : begin + count]
        for sees_one, sees_all, end in spans[first_span : first_span + num_spans]:
            assert sees_one <= sees_all <= end
            for i in range(sees_one, end):
                visible = min(count, depths[i] - depth + 1)
                assert visible == count if i >= sees_all else 0 < visible < count
                of_keys += [(q_rows[i], key) for key in key_rows[begin : begin + visible]]
    assert sorted(seen) == sorted({key for _, key in expected})
    assert len(of_keys) == len(expected)
    assert set(of_keys) == expected
    assert len(set(seen)) <= num_keys
    assert {query for query, _ in expected} == set(range(num_queries))


@given(trees(), st.sampled_from([0.3, 1.0]))
@settings(deadline=None)
def test_flashinfers_requests_see_what_the_plan_sees(nodes, share):
    plan, *_ = tree_plan(Bench("cpu", torch.float32, is_small=True), nodes, share)
    if not plan:
        return
    num_queries, num_keys, indices = flashinfer._requests(plan)
    found, first_key = [], 0
    for queries, keys in zip(num_queries, num_keys, strict=True):
        rows = indices[first_key : first_key + keys].tolist()
        # A causal mask whose last query sees the last key.
        found += [rows[: keys - queries + 1 + i] for i in range(queries)]
        first_key += keys
    expected = [block.keys[: d + 1].tolist() for block in plan for d in block.depths.tolist()]
    assert found == expected


@pytest.mark.parametrize("second", [[1, 0], [2, 1]])
def test_paths_that_make_no_tree_are_refused(second):
    def block(query, keys):
        return PathBlock(torch.tensor([query]), torch.tensor([len(keys) - 1]), torch.tensor(keys))

    with pytest.raises(ValueError, match="not one of a tree: row"):
        pack([block(0, [0, 1]), block(1, second)], 4, 4)
