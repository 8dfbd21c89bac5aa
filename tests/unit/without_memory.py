"""Run by test_recording_fails.py: an engine whose process may take no more memory at the moment that is named.

    python without_memory.py begin|record|write|flush|hedge|reclaim

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

from pool_support import as_recorded
from scheduler_support import Scheduler

from alchemist.trainer.rows import Recorded, RowsRevoked

SIZE = 400_000
"""KV slots: bookkeeping of a batch that fills them takes tens of megabytes."""
MARGIN = 256 << 10
PROMPT = 200
IDLE = SimpleNamespace(idle_sleeper=None)


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
    server = Scheduler(directory, SIZE)
    engine, pool, allocator = server.engine, server.pool, server.allocator
    prompt = server.prefill(PROMPT)
    assert prompt.begin()
    prompt.compute()
    engine._flush()
    pool.finish("a", prompt.slots, PROMPT, 0.0)
    reading = as_recorded(pool.check_out("a", prompt.slots, PROMPT))
    assert (reading.rows >= 0).all()
    other = server.prefill(20_000, but=20_000)
    if moment == "begin":
        engine.recorder._may_defer = False
        other = server.prefill(SIZE // 2)
        with no_more_memory():
            assert not other.begin()
    elif moment == "record":
        other = server.prefill(SIZE // 2)
        assert other.begin()
        # Whatever looks at the tables next begins the rows.
        with no_more_memory():
            engine._appraise(0.0)
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


def check(server: Scheduler, reading: Recorded) -> None:
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
