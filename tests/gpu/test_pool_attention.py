"""Attention that reads recorded keys in the KV pool, on a GPU: FlashInfer over the pool, Triton over the rest."""

import math

import pytest
import torch
from kernel_accuracy import Bench, pooled

from alchemist.kernels.path_attention import PathBlock, flashinfer, paged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def kernels_for(k, v):
    if not flashinfer.is_available():
        pytest.skip("flashinfer is not installed")
    found = paged.kernels(k.dtype, k, v)
    assert found is not None
    return found


@pytest.mark.parametrize("shape", [(4, 8, 128), (7, 2, 128)], ids=str)
@pytest.mark.parametrize("tree", ["chain", "branches"])
def test_error_is_that_of_plain_torch(tree, shape):
    bench = Bench("cuda", torch.bfloat16, is_small=False)
    sample = bench.random(1, *shape[1:])
    found = pooled(bench, tree, shape, kernels_for(sample, sample))
    assert found.ok, found


def test_log_sum_exp_is_natural():
    """What FlashInfer gives has base 2."""
    bench = Bench("cuda", torch.bfloat16, is_small=False)
    q, k, v = (bench.random(n, heads, 128) for n, heads in ((5, 32), (70, 8), (70, 8)))
    kernels = kernels_for(k, v)
    keys = torch.arange(69)
    plan = [PathBlock(torch.arange(5), torch.arange(64, 69), keys)]
    slots = torch.where(keys < 64, 69 - keys, -1)
    _, found = kernels.over_pool(q, k, v, paged.split(plan, slots))
    seen = k[69 - keys[:64]].double().repeat_interleave(4, dim=1)
    expected = (torch.einsum("qnd,snd->qns", q.double(), seen) / math.sqrt(128)).logsumexp(-1)
    assert float((found - expected).abs().max()) < 1e-2
