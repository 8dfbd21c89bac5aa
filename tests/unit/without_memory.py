"""Run by test_recording_fails.py: an engine whose process may take no more memory at the moment that is named.

    python without_memory.py record|write|flush|hedge|reclaim

Prints why recording stopped. Everything is real but the forward passes: SGLang's allocator, our engine, recorder and
pool, and the operating system's limit.
"""

import gc
import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import pool_support
from pool_support import as_recorded, bare_model
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from alchemist.protocol.lease import Lease
from alchemist.server.config import Config
from alchemist.server.engine import Engine
from alchemist.server.run import Run
from alchemist.trainer.rows import ActivationView, Recorded, RowsRevoked

SIZE = 400_000
"""KV slots: bookkeeping of a batch that fills them takes tens of megabytes."""
MARGIN = 256 << 10
PROMPT = 200
IDLE = SimpleNamespace(idle_sleeper=None)


class Server:
    """A scheduler's half of a server without a model."""

    def __init__(self, directory: str) -> None:
        lease = Lease.create()
        config = Config(activation_host_bytes=64 << 20).to_json()
        self.engine = Engine(Run(directory=directory, config=config, lease=lease.segment.handle))
        self.layout = pool_support.layout(1)
        k, v = ([torch.zeros(SIZE + 1, 1, 2) for _ in range(2)] for _ in range(2))
        self.allocator = TokenToKVPoolAllocator(
            SIZE, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False
        )
        runner = SimpleNamespace(
            token_to_kv_pool=SimpleNamespace(k_buffer=k, v_buffer=v),
            token_to_kv_pool_allocator=self.allocator,
            model=bare_model(),
        )
        self.engine._make_pool(runner, self.layout)
        self.pool = self.engine.pool
        assert self.pool is not None
        self.view = ActivationView(
            self.layout,
            self.pool.host.data,
            k,
            v,
            torch.from_numpy(self.pool.gens),
            torch.from_numpy(self.pool.device.cells),
        )

    def prefill(self, count: int, *, but: int = 0) -> "Prefill":
        """The forward pass of a new prompt of `count` tokens, and of one of `but` tokens that is not recorded."""
        return Prefill(self, count, but)


class Prefill:
    """All of it is ready but what recording does."""

    def __init__(self, server: Server, count: int, but: int) -> None:
        self.engine = server.engine
        total = count + but
        self.slots = server.allocator.alloc(total)
        self.batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            out_cache_loc=self.slots,
            positions=torch.arange(total),
            rids=["no", "yes"] if but else ["yes"],
            extend_seq_lens_cpu=[but, count] if but else [count],
            seq_lens_cpu=torch.tensor([but, count] if but else [count]),
        )
        self.engine._opted_out.add("no")
        self.values = {
            field: torch.ones(total, width)
            for field, (_, width) in server.layout.fields.items()
            if field not in ("keys", "values")
        }

    def begin(self) -> bool:
        self.recorder = self.engine.recorder
        return self.engine.begin_forward(self.batch)

    def compute(self) -> None:
        for layer in range(2):
            for field, value in self.values.items():
                self.recorder._write(layer, field, value)
        self.engine.end_forward()


@contextmanager
def no_more_memory() -> Iterator[None]:
    gc.collect()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    was = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MARGIN, was[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, was)


def main(moment: str, directory: str) -> None:
    server = Server(directory)
    engine, pool, allocator = server.engine, server.pool, server.allocator
    prompt = server.prefill(PROMPT)
    assert prompt.begin()
    prompt.compute()
    engine._flush()
    pool.finish("a", prompt.slots, PROMPT, 0.0)
    reading = as_recorded(pool.check_out("a", prompt.slots, PROMPT))
    assert (reading.rows >= 0).all()
    other = server.prefill(20_000, but=20_000)
    if moment == "record":
        other = server.prefill(SIZE // 2)
        with no_more_memory():
            assert not other.begin()
    elif moment == "write":
        engine.recorder._may_defer = False
        assert other.begin()
        with no_more_memory():
            other.compute()
    elif moment == "flush":
        assert other.begin()
        other.compute()
        with no_more_memory():
            engine._flush()
    elif moment == "hedge":
        engine._rows_per_portion = 20_000
        assert other.begin()
        other.compute()
        engine._flush()
        with no_more_memory():
            engine._keep_house(IDLE)
    elif moment == "reclaim":
        pool.device.borrow(SIZE)
        with no_more_memory():
            slots = allocator.alloc(allocator.available_size())
            assert slots is not None, "serving did not get its slots back"
        allocator.free(slots)
    check(server, reading)
    print(pool.stats()["stopped"])


def check(server: Server, reading: Recorded) -> None:
    """Serving has everything back, the reader is told, and nothing is recorded any more."""
    engine, pool, allocator = server.engine, server.pool, server.allocator
    assert engine.recorder is None
    pool.check_integrity()
    free = allocator.free_pages
    assert len(torch.unique(free)) == len(free) == allocator.available_size()
    with pytest.raises(RowsRevoked) as revoked:
        server.view.check(reading.rows, reading.gens)
    assert len(revoked.value.rows) == PROMPT
    later = server.prefill(8)
    assert not later.begin()
    engine._keep_house(IDLE)
    pool.finish("b", later.slots, 8, 1.0)
    pool.voted("b", 2.0)
    assert (pool.check_out("b", later.slots, 8).rows == -1).all()
    assert allocator.alloc(allocator.available_size()) is not None


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(sys.argv[1], name)
