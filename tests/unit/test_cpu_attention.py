"""Attention on a CPU, against what SGLang's own `torch_native` backend computes of the same batch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import alchemist.server.main  # noqa: F401  (before sglang)
from alchemist.server import cpu_attention
from alchemist.server.cpu_attention import BLOCK, BLOCKS_UP_TO, CpuAttention

HEADS = [(4, 2, 64), (3, 3, 32), (8, 2, 16)]
"""Of queries, of keys, and their width."""
BATCHES = [
    ([0], [1]),
    ([0], [BLOCK]),
    ([0], [2 * BLOCK + 3]),
    ([0, 700, 3], [65, 40, 1]),
    ([BLOCKS_UP_TO - 10], [10]),
    ([BLOCKS_UP_TO - 10, 5], [11, 6]),
    ([0], [BLOCKS_UP_TO + 1]),
]
"""Cached and new tokens of each request."""


class Server:
    """SGLang's backend with caches, and a batch."""

    def __init__(self, heads, batch, dtype=torch.float32):
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        self.backend = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
        self.backend.use_sliding_window_kv_pool = False
        self.ours = CpuAttention()
        self.num_heads, num_groups, self.width = heads
        generator = torch.Generator().manual_seed(0)
        self.random = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
        self.caches = [self.random(4000, num_groups, self.width) for _ in range(2)]
        # Slots in no order, as after many requests.
        self.req_to_token = torch.randperm(4000, generator=generator)[:3600].view(3, 1200).int()
        self.options = {
            "scaling": self.width**-0.5,
            "enable_gqa": self.num_heads != num_groups,
            "causal": True,
            "is_cross_attn": False,
            "sliding_window_size": None,
        }
        self.begin(*batch)

    def begin(self, prefixes, extends):
        self.requests = torch.tensor([2, 0, 1][: len(prefixes)])
        self.prefixes, self.extends = torch.tensor(prefixes), torch.tensor(extends)
        self.lengths = self.prefixes + self.extends
        self.ours.begin(None, self.backend, None)

    def _compute(self, name, num_tokens, lengths, *, only_ours=False, **options):
        """(Ours, SGLang's, whether ours asked SGLang's)."""
        original = getattr(type(self.backend), f"_run_sdpa_forward_{name}")
        asked = []

        def ask(*args, **kwargs):
            asked.append(name)
            return original(*args, **kwargs)

        query = self.random(num_tokens, self.num_heads, self.width)
        given = (*self.caches, self.req_to_token, self.requests, *lengths, None)
        options = self.options | options
        found, expected = torch.full_like(query, torch.nan), torch.empty_like(query)
        result = getattr(self.ours, name)(ask, self.backend, query, found, *given, **options)
        assert result is found
        if not only_ours:
            original(self.backend, query, expected, *given, **options)
        return found, expected, bool(asked)

    def extend(self, **options):
        lengths = (self.lengths, self.prefixes, self.extends)
        return self._compute("extend", int(self.extends.sum()), lengths, **options)

    def decode(self, **options):
        options = {"causal": False} | options
        return self._compute("decode", len(self.requests), (self.lengths,), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", HEADS)
def test_answers_are_sglangs(heads, batch, dtype):
    server = Server(heads, batch, dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    for _ in range(2):  # layers
        found, expected, asked = server.extend()
        torch.testing.assert_close(found, expected, **tolerance)
        assert not asked
    found, expected, asked = server.decode()
    torch.testing.assert_close(found, expected, **tolerance)
    assert not asked


def test_no_scale_is_the_usual_one():
    server = Server(HEADS[0], BATCHES[3])
    for found, expected, _ in (server.extend(scaling=None), server.decode(scaling=None)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_forward_has_its_own_lengths_and_slots():
    server = Server(HEADS[0], ([0], [20]))
    server.extend()
    # The same tensors with other values, as SGLang's buffers are.
    server.begin([20, 4], [1, 30])
    server.req_to_token[:] = server.req_to_token.flip(0)
    found, expected, _ = server.extend()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_cached_prefix_is_not_computed_again():
    """A product of E queries with N keys, one with N values; nothing that grows as N squared."""
    new, prefix, (num_heads, _, width) = 10, 900, HEADS[0]
    server = Server(HEADS[0], ([prefix], [new]))
    with FlopCounterMode(display=False) as counter:
        server.extend(only_ours=True)
    most = 2 * 2 * num_heads * new * (prefix + new) * width
    assert 0 < counter.get_total_flops() <= most


def test_a_long_cached_prefix_is_not_computed_again(monkeypatch):
    """torch's fused attention, which the counter does not know, is asked for new tokens' queries only."""
    asked, fused = [], cpu_attention.scaled_dot_product_attention

    def noting(query, *args, **kwargs):
        asked.append(query.shape[2])
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(cpu_attention, "scaled_dot_product_attention", noting)
    Server(HEADS[0], ([BLOCKS_UP_TO], [10])).extend(only_ours=True)
    assert asked == [10]


@pytest.mark.parametrize("option", [{"sliding_window_size": 8}, {"is_cross_attn": True}])
def test_what_only_sglang_knows_stays_sglangs(option):
    server = Server(HEADS[0], ([0], [20]))
    for found, expected, asked in (server.extend(**option), server.decode(**option)):
        assert asked
        torch.testing.assert_close(found, expected)


def test_encoders_stay_sglangs():
    found, expected, asked = Server(HEADS[0], ([0], [20])).extend(causal=False)
    assert asked
    torch.testing.assert_close(found, expected)


def test_a_cache_of_another_dtype_stays_sglangs():
    server = Server(HEADS[0], ([0], [20]))
    server.caches = [cache.bfloat16() for cache in server.caches]
    for found, expected, asked in (server.extend(), server.decode()):
        assert asked
        torch.testing.assert_close(found, expected)
