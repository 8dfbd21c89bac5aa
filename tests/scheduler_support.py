"""The scheduler process's half of a server without a model: SGLang's allocator; our engine, recorder and pool."""

from __future__ import annotations

from types import SimpleNamespace

import pool_support
import torch
from pool_support import bare_model
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from alchemist.protocol.lease import Lease
from alchemist.server.config import Config
from alchemist.server.engine import Engine
from alchemist.server.run import Run
from alchemist.trainer.rows import ActivationView


class Scheduler:
    """Attributes: engine, pool, allocator of `size` KV slots, and the trainer's view of the pool."""

    def __init__(self, directory: str, size: int) -> None:
        lease = Lease.create()
        config = Config(activation_host_bytes=64 << 20).to_json()
        self.engine = Engine(Run(directory=directory, config=config, lease=lease.segment.handle))
        self.layout = pool_support.layout(1)
        k, v = ([torch.zeros(size + 1, 1, 2) for _ in range(2)] for _ in range(2))
        self.allocator = TokenToKVPoolAllocator(
            size, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False
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

    def prefill(self, count: int, *, but: int = 0) -> Prefill:
        """The forward pass of a new prompt of `count` tokens, and of one of `but` tokens that is not recorded."""
        return Prefill(self, count, but)


class Prefill:
    """All of it is ready but what recording does."""

    def __init__(self, server: Scheduler, count: int, but: int) -> None:
        self.engine = server.engine
        total = count + but
        self.slots = server.allocator.alloc(total)
        self.batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            out_cache_loc=self.slots,
            positions=torch.arange(total),
            rids=["no", "yes"] if but else ["yes"],
            batch_size=2 if but else 1,
            lora_ids=None,
            extend_seq_lens_cpu=[but, count] if but else [count],
            seq_lens_cpu=torch.tensor([but, count] if but else [count]),
        )
        self.engine._unrecorded.add("no")
        self.values = {
            field: torch.ones(total, width)
            for field, width in server.layout.widths.items()
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
