"""The Triton kernels on a GPU: accuracy against plain PyTorch, CUDA graph capture, equal bits from run to run."""

import pytest
import torch
from kernel_accuracy import (
    CASES,
    TREES,
    Bench,
    dense_attention,
    measure,
    plan_mask,
    tree_plan,
)

from alchemist.kernels import pack_rows, path_attention, replay_linear
from alchemist.kernels.pack_rows import Field
from alchemist.kernels.pack_rows import reference as pack_rows_reference
from alchemist.kernels.replay_linear import LoraPart

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_is_that_of_plain_torch(name, dtype):
    found = list(CASES[name](Bench("cuda", dtype, is_small=False)))
    assert found
    bad = [comparison for comparison in found if not comparison.ok]
    assert not bad, "\n".join(map(str, bad))


def test_rows_are_packed_inside_a_cuda_graph():
    bench = Bench("cuda", torch.bfloat16, is_small=False)
    num_tokens, size, slots_per_row = 8, 1024, 4
    keys, values = bench.random(64, size), bench.random(64, size)
    expected = keys.clone(), values.clone()
    cells = torch.randperm(64, device="cuda")[: 10 * slots_per_row].view(10, slots_per_row)
    fields = [
        Field(bench.random(num_tokens, 2 * size), 0),
        Field(bench.random(num_tokens, 3000), 3),
    ]
    rows = torch.full((num_tokens,), -1, device="cuda")
    # Compiled before the capture: nothing may be loaded during it.
    pack_rows.pack_rows(fields, rows, cells, keys, values)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack_rows.pack_rows(fields, rows, cells, keys, values)
    for _ in range(2):
        rows.copy_(torch.randperm(10, device="cuda")[:num_tokens])
        rows[3] = -1
        for field in fields:
            field.value.copy_(bench.random(*field.value.shape))
        graph.replay()
        pack_rows_reference.pack_rows(fields, rows, cells, *expected)
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])


def test_attention_gives_equal_bits_from_run_to_run():
    bench = Bench("cuda", torch.bfloat16, is_small=False)
    nodes, share = TREES["branches"]
    plan, num_queries, num_keys = tree_plan(bench, [(p, 20 * n) for p, n in nodes], share)
    q = bench.random(num_queries, 32, 128).requires_grad_()
    k, v = (bench.random(num_keys, 8, 128).requires_grad_() for _ in range(2))
    d_out = bench.random(*q.shape)
    runs = []
    for _ in range(3):
        out = path_attention.path_attention(q, k, v, plan)
        runs.append([out.detach(), *torch.autograd.grad(out, [q, k, v], d_out)])
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            assert torch.equal(found, expected)


def test_adapter_gradients_can_stay_in_float32():
    bench = Bench("cuda", torch.bfloat16, is_small=False)
    x, weight = bench.random(700, 512), bench.random(256, 512, scale=0.05)
    a, b = bench.random(16, 512, scale=0.05), bench.random(256, 16)
    d_y = bench.random(700, 256)

    def gradients(grad_dtype):
        leaves = [t.detach().requires_grad_() for t in (a, b)]
        for leaf in leaves:
            leaf.grad_dtype = grad_dtype
        (y,) = replay_linear.replay_linear(x, weight, None, [LoraPart(0, 256, *leaves)], 2.0)
        return torch.autograd.grad(y, leaves, d_y)

    wide = [t.double() for t in (x, a, b, d_y)]
    truth = (2.0 * (wide[3] @ wide[2]).T @ wide[0], 2.0 * wide[3].T @ (wide[0] @ wide[1].T))
    for rounded, kept, exact in zip(
        gradients(torch.bfloat16), gradients(torch.float32), truth, strict=True
    ):
        assert (rounded.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
        errors = [float((t.double() - exact).square().mean().sqrt()) for t in (kept, rounded)]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("tree", ["branches", "few missing"])
def test_flashinfers_forward_gives_the_same_attention(tree):
    pytest.importorskip("flashinfer")
    from alchemist.kernels.path_attention import flashinfer

    bench = Bench("cuda", torch.bfloat16, is_small=False)
    nodes, share = TREES[tree]
    plan, num_queries, num_keys = tree_plan(bench, [(p, 9 * n) for p, n in nodes], share)
    q = bench.random(num_queries, 32, 128)
    k, v = (bench.random(num_keys, 8, 128) for _ in range(2))
    mask = plan_mask(plan, num_queries, num_keys)
    runs = [
        flashinfer.forward(q, k, v, plan),
        dense_attention(q, k, v, mask),
        dense_attention(q.double(), k.double(), v.double(), mask),
    ]
    found = measure("flashinfer", "output", *runs)
    assert found.ok, found
