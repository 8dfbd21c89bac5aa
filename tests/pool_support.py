"""A pool over real KV buffers and SGLang's own allocator, with serving's use of them beside it."""

from collections.abc import Callable
from types import SimpleNamespace

import alchemist.server.cpu as cpu

cpu.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sglang.srt.mem_cache.allocator import (  # noqa: E402
    PagedTokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
)

from alchemist.protocol.layout import ActivationDtype, RowLayout  # noqa: E402
from alchemist.protocol.tensors import Arena  # noqa: E402
from alchemist.server.cpu_allocator import CpuPagedAllocator  # noqa: E402
from alchemist.server.lender import Lender  # noqa: E402
from alchemist.server.pool import ActivationPool  # noqa: E402
from alchemist.trainer.rows import ActivationView, Recorded  # noqa: E402

SIZE = 48
"""Slots that serving may use; slot 0 (page 0) is the dummy."""


def layout(page_size: int, activation_dtype: ActivationDtype = "auto") -> RowLayout:
    # Twelve cells: x 2 (the second one half empty), q 2, attn 2, mid 2, gate_up 4 (in eight bits 2, of them one half).
    return RowLayout(
        num_layers=2,
        hidden_size=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=4,
        has_qk_norm=False,
        dtype="float32",
        cell=2,
        page_size=page_size,
        activation_dtype=activation_dtype,
    )


PINNED = []
"""Pools on a GPU's machine. The driver knows page-locked memory by its address, also when that is somebody else's."""


class World:
    """A pool over real KV buffers and a real allocator, and serving's use of them."""

    def __init__(
        self,
        page_size=1,
        *,
        host_rows=4,
        eviction="value",
        fraction=1.0,
        kv_dtype=torch.float32,
        activation_dtype="auto",
        is_shared=False,
        is_deferred=None,
        device="cpu",
    ):
        """Args:
        is_shared: another process may map the KV buffers, too, as it may whatever the pool has.
        """
        per_cell = {torch.float32: 1, torch.float16: 2}[kv_dtype]
        self.layout = layout(page_size, activation_dtype)
        shape = (SIZE + page_size, 1, 2 * per_cell)
        names = ("k0", "k1", "v0", "v1")
        self.kv = Arena("kv", dict.fromkeys(names, (shape, kv_dtype))) if is_shared else None
        buffers = (
            self.kv.tensors
            if self.kv
            else {n: torch.zeros(shape, dtype=kv_dtype, device=device) for n in names}
        )
        self.k, self.v = ([buffers[f"{kind}{layer}"] for layer in range(2)] for kind in "kv")
        # As in a server: on a CPU one of pages, whatever their size.
        kind = PagedTokenToKVPoolAllocator if is_deferred or device != "cpu" else CpuPagedAllocator
        arguments = {"dtype": kv_dtype, "device": device, "kvcache": None, "need_sort": False}
        if kind is PagedTokenToKVPoolAllocator and page_size == 1:
            kind = TokenToKVPoolAllocator
        else:
            arguments["page_size"] = page_size
        self.allocator = kind(SIZE, **arguments)
        self.pool = ActivationPool(
            self.layout,
            self.k,
            self.v,
            Lender(self.allocator),
            num_device_rows=int(SIZE * fraction) // self.layout.slots_per_row,
            num_host_rows=host_rows,
            eviction=eviction,
            is_deferred=is_deferred,
        )
        if device != "cpu":
            PINNED.append(self.pool)
        self.pool.install()
        self.pool.settle()
        self.page_size = page_size
        shared = (
            self.layout,
            self.pool.host.data,
            self.k,
            self.v,
            torch.from_numpy(self.pool.gens),
            torch.from_numpy(self.pool.device.cells),
        )
        self.view: ActivationView
        if self.pool.arrivals.is_deferred:
            from alchemist.trainer.gpu_rows import GpuView

            self.view = GpuView(*shared, torch.from_numpy(self.pool.arrivals.counts))
        else:
            self.view = ActivationView(*shared)
        self.device = torch.device(device)
        self.stamp = 0.0

    @property
    def num_free(self) -> int:
        """Pages that serving can have before any comes back."""
        return self.allocator.free_pages.numel() - self.pool._lender.num_lent

    def serve(self, count: int) -> torch.Tensor | None:
        """Serving takes `count` slots (whole pages) and writes keys and values there: their number as the value."""
        slots = self.allocator.alloc(count * self.page_size)
        if slots is not None:
            for buffer in (*self.k, *self.v):
                buffer[slots] = slots.to(buffer.dtype).view(-1, 1, 1)
        return slots

    def record(self, slots: torch.Tensor) -> dict[int, float]:
        """Prefill of tokens in `slots`: what each slot's row holds, for those that got one."""
        # Staged rows have no place of their own to be written to: `test_gpu_recorder.py` has those.
        is_graph = self.pool.arrivals.is_deferred
        rows = self.pool.record(slots, torch.arange(slots.numel()), is_graph=is_graph)
        return self.fill(rows, slots)

    def fill(self, rows: np.ndarray, slots: torch.Tensor) -> dict[int, float]:
        """Write the rows of the first tokens in `slots`; what each slot's row holds."""
        held = {}
        for row, slot in zip(rows, slots.tolist(), strict=False):
            self.stamp += 1
            held[slot] = self.stamp
            for layer in range(2):
                for field, width in self.layout.widths.items():
                    if field not in ("keys", "values"):
                        value = torch.full((1, width), self.stamp + layer / 2).to(self.device)
                        self.pool.write(layer, field, np.array([row]), value)
        self.pool.complete(rows)
        return held

    def read(self, found: Recorded, *, check: bool = True) -> list[tuple[float, float]]:
        """See `read`."""

        def settle() -> None:
            # What a reader waits for where ends of rows are settled later.
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.pool.settle(wait=True)

        return read(
            self.view, found, self.k[0].shape[1:], check=check, settle=settle, device=self.device
        )


def read(
    view: ActivationView,
    found: Recorded,
    kv_shape: torch.Size,
    *,
    check: bool = True,
    settle: Callable[[], None] = lambda: None,
    device: torch.device | str = "cpu",
) -> list[tuple[float, float]]:
    """(stamp, slot of the keys) of every recorded token; every cell of every field must agree.

    Args:
        kv_shape: of one slot's keys.
        check: compare generations afterwards, as the trainer does.
        settle: what the server does meanwhile.

    Raises:
        RowsRevoked: a row was taken away.
    """
    where = found.rows >= 0
    rows, slots = found.rows[where], found.slots[where]
    seen, pairs = [], []
    for layer in range(2):
        for field, width in view.layout.widths.items():
            if field in ("keys", "values"):
                continue
            out = torch.full((rows.numel(), width), float("nan"), device=device)
            view.fetch(layer, field, rows, out)
            seen += (out - layer / 2).unbind(1)
        keys = torch.empty(rows.numel(), *kv_shape, device=device)
        values = torch.empty_like(keys)
        view.fetch_kv(layer, rows, slots, keys, values)
        pairs.append((keys, values))
    if check:
        view.check(rows, found.gens[where])
        settle()
        view.confirm()
        assert all(torch.equal(a, b) for a, b in pairs)
        assert all(torch.equal(s, seen[0]) for s in seen)
    return list(zip(seen[0].tolist(), keys[:, 0, 0].tolist(), strict=True))


def bare_model() -> SimpleNamespace:
    """What a recorder taps, of modules that are never called: tests hand it what would pass."""

    def module() -> torch.nn.Module:
        found = torch.nn.Identity()
        found._forward_method = found.forward_native = None
        return found

    def layer() -> SimpleNamespace:
        attention = SimpleNamespace(qkv_proj=module(), o_proj=module(), rotary_emb=module())
        mlp = SimpleNamespace(gate_up_proj=module(), act_fn=module())
        return SimpleNamespace(
            input_layernorm=module(),
            post_attention_layernorm=module(),
            self_attn=attention,
            mlp=mlp,
        )

    return SimpleNamespace(model=SimpleNamespace(layers=[layer() for _ in range(2)]))


def as_recorded(out) -> Recorded:
    return Recorded(
        torch.from_numpy(out.rows),
        torch.from_numpy(out.slots),
        torch.from_numpy(out.gens),
        (torch.from_numpy(out.hedge_rows), torch.from_numpy(out.hedge_gens)),
    )
