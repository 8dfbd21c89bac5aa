"""Recording on a GPU: nothing waits for the device, decode steps are recorded inside CUDA graphs, copies go beside."""

import time
from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings
from pool_machine import PoolMachine
from pool_support import PINNED, World, as_recorded
from torch import nn

from alchemist.kernels import fp8_rows
from alchemist.protocol.layout import RowLayout
from alchemist.server.gpu_recorder import GpuRecorder
from alchemist.server.lender import Lender
from alchemist.server.pool import ActivationPool
from alchemist.trainer.gpu_rows import GpuView

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

in_both = pytest.mark.parametrize("activation_dtype", ["auto", "fp8"])
HIDDEN, HEADS, KV_HEADS, DIM, INNER, LAYERS = 256, 4, 2, 64, 512, 3


class GpuPoolMachine(PoolMachine):
    device = "cuda"


TestGpuPool = GpuPoolMachine.TestCase
# Every step waits for the device several times.
TestGpuPool.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)


@contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Tuple(nn.Linear):
    """A linear as SGLang's: (output, bias)."""

    def forward(self, x):
        return super().forward(x), None


class _Norm(nn.Module):
    """As SGLang's fused kernel: the sum is written into the residual, the normed values into the input."""

    def forward(self, x, residual=None):
        if residual is None:
            return x / x.float().pow(2).mean(-1, keepdim=True).sqrt().to(x.dtype)
        residual.add_(x)
        x.copy_(residual / residual.float().pow(2).mean(-1, keepdim=True).sqrt().to(x.dtype))
        return x, residual


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = _Tuple(HIDDEN, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.o_proj = _Tuple(HEADS * DIM, HIDDEN, bias=False)


class _Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = _Tuple(HIDDEN, 2 * INNER, bias=False)
        self.down_proj = _Tuple(INNER, HIDDEN, bias=False)


class _Layer(nn.Module):
    """One decoder layer with its operations in SGLang's order and in place where SGLang's are; attention itself is
    elementwise, for what matters here is when which tensor is where.
    """

    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = _Norm(), _Norm()
        self.self_attn, self.mlp = _Attention(), _Mlp()

    def forward(self, x, residual, cache, slots):
        if residual is None:
            residual = x
            x = self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        qkv, _ = self.self_attn.qkv_proj(x)
        q, k, v = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
        # Rope writes into q and k.
        q.mul_(0.5)
        k.mul_(0.5)
        cache[0][slots] = k.reshape(-1, KV_HEADS, DIM)
        cache[1][slots] = v.reshape(-1, KV_HEADS, DIM)
        x, _ = self.self_attn.o_proj(torch.tanh(q))
        x, residual = self.post_attention_layernorm(x, residual)
        gate_up, _ = self.mlp.gate_up_proj(x)
        gate, up = gate_up.chunk(2, dim=-1)
        x, _ = self.mlp.down_proj(nn.functional.silu(gate) * up)
        return x, residual


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))

    def forward(self, x, caches, slots):
        residual = None
        # As an embedding is: nobody else's.
        x = x.clone()
        for layer, cache in zip(self.model.layers, caches, strict=True):
            x, residual = layer(x, residual, cache, slots)
        return x


class Serving:
    """A model, its KV pool and SGLang's allocator on a GPU, with an activation pool and a recorder."""

    def __init__(
        self, activation_dtype="auto", *, max_decode_tokens=0, num_slots=4096, num_host_rows=64
    ):
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

        torch.manual_seed(0)
        self.model = Model().to("cuda", torch.bfloat16).requires_grad_(False)
        self.layout = RowLayout(
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            intermediate_size=INNER,
            has_qk_norm=False,
            dtype="bfloat16",
            cell=KV_HEADS * DIM,
            activation_dtype=activation_dtype,
        )
        self.k, self.v = (
            [
                torch.zeros(num_slots + 1, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
                for _ in range(LAYERS)
            ]
            for _ in range(2)
        )
        self.allocator = TokenToKVPoolAllocator(
            num_slots, dtype=torch.bfloat16, device="cuda", kvcache=None, need_sort=False
        )
        self.pool = ActivationPool(
            self.layout,
            self.k,
            self.v,
            Lender(self.allocator),
            num_device_rows=num_slots // self.layout.slots_per_row,
            num_host_rows=num_host_rows,
        )
        PINNED.append(self.pool)
        self.recorder = GpuRecorder(
            self.model, self.layout, self.pool, max_decode_tokens=max_decode_tokens
        )
        self.pool.install()
        self.pool.settle(wait=True)
        self.view = GpuView(
            self.layout,
            self.pool.host.data,
            self.k,
            self.v,
            torch.from_numpy(self.pool.gens),
            torch.from_numpy(self.pool.device.cells),
            torch.from_numpy(self.pool.arrivals.counts),
        )

    def run(self, x, slots):
        return self.model(x, list(zip(self.k, self.v, strict=True)), slots)

    def reference(self, x):
        """What should be recorded of a pass over x: by (layer, field), from hooks that copy everything at once."""
        seen, handles = {}, []

        def keep(layer, field, pick):
            def hook(module, args, output):
                seen[layer, field] = pick(args, output).clone()

            return hook

        def first(args, output):
            return output[1] if isinstance(output, tuple) else args[0]

        for number, layer in enumerate(self.model.model.layers):
            for module, field, pick in (
                (layer.input_layernorm, "x", first),
                (layer.self_attn.qkv_proj, "q", lambda a, o: o[0][:, : HEADS * DIM]),
                (layer.self_attn.o_proj, "attn", lambda a, o: a[0]),
                (layer.post_attention_layernorm, "mid", first),
                (layer.mlp.gate_up_proj, "gate_up", lambda a, o: o[0]),
            ):
                handles.append(module.register_forward_hook(keep(number, field, pick)))
        scratch = torch.zeros(x.shape[0], KV_HEADS, DIM, dtype=x.dtype, device="cuda")
        caches = [(scratch.clone(), scratch.clone()) for _ in range(LAYERS)]
        self.model(x, caches, torch.arange(x.shape[0], device="cuda"))
        for handle in handles:
            handle.remove()
        for number, (keys, values) in enumerate(caches):
            seen[number, "keys"], seen[number, "values"] = keys.flatten(1), values.flatten(1)
        for (_, field), value in seen.items():
            if self.layout.is_encoded(field):
                # What is read back of it.
                fp8_rows.decode(fp8_rows.encode(value), value)
        return seen

    def recorded(self, slots):
        """(places of the tokens in `slots`, what the trainer's view finds there)."""
        self.pool.settle(wait=True)
        known = slots.cpu()
        self.pool.finish("a", known, known.numel(), 0.0)
        found = as_recorded(self.pool.check_out("a", known, known.numel()))
        return found, self.read(found)

    def read(self, found):
        where = found.rows >= 0
        rows, slots = found.rows[where], found.slots[where]
        seen = {}
        for layer in range(LAYERS):
            for field, width in self.layout.widths.items():
                if field not in ("keys", "values"):
                    out = torch.empty(rows.numel(), width, dtype=torch.bfloat16, device="cuda")
                    self.view.fetch(layer, field, rows, out)
                    seen[layer, field] = out
            kv = torch.empty(2, rows.numel(), KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
            self.view.fetch_kv(layer, rows, slots, kv[0], kv[1])
            seen[layer, "keys"], seen[layer, "values"] = kv[0].flatten(1), kv[1].flatten(1)
        self.view.check(rows, found.gens[where])
        self.view.confirm()
        return seen


def random_tokens(count):
    return torch.randn(count, HIDDEN, dtype=torch.bfloat16, device="cuda")


def assert_same(seen, expected, which=slice(None)):
    for place, value in expected.items():
        assert torch.equal(seen[place], value[which]), place


@in_both
def test_a_prefill_is_recorded_bit_by_bit_and_its_output_unchanged(activation_dtype):
    serving = Serving(activation_dtype)
    x, slots = random_tokens(70), serving.allocator.alloc(70)
    plain = serving.run(x, slots)
    serving.pool.settle(wait=True)
    assert serving.recorder.begin(slots, torch.arange(70))
    recorded = serving.run(x, slots)
    serving.recorder.end()
    assert torch.equal(plain, recorded)
    found, seen = serving.recorded(slots)
    assert (found.rows >= 0).all()
    assert_same(seen, serving.reference(x))


@in_both
def test_no_step_of_recording_waits_for_the_device(activation_dtype):
    serving = Serving(activation_dtype)
    x, slots = random_tokens(40), serving.allocator.alloc(40)
    serving.pool.settle(wait=True)
    # Compiled by the first pass.
    assert serving.recorder.begin(slots, torch.arange(40))
    serving.run(x, slots)
    serving.recorder.end()
    serving.pool.settle(wait=True)
    with no_synchronisation():
        again = serving.allocator.alloc(40)
        # Behind this everything that is enqueued has to wait.
        torch.cuda._sleep(200_000_000)
        started = time.perf_counter()
        serving.pool.settle()
        assert serving.recorder.begin(again, torch.arange(40), torch.arange(0, 40, 2))
        serving.run(x, again)
        serving.recorder.end()
        serving.pool.settle()
        serving.allocator.free(slots)
        serving.pool.settle()
        assert serving.allocator.alloc(3000) is not None
        elapsed = time.perf_counter() - started
    assert elapsed < 0.05
    assert not serving.pool.is_settled
    found, seen = serving.recorded(again)
    kept = torch.nonzero(found.rows >= 0).flatten()
    assert set(kept.tolist()) <= set(range(0, 40, 2))
    assert_same(seen, serving.reference(x), kept.cuda())


@in_both
def test_decode_steps_are_recorded_inside_a_cuda_graph(activation_dtype):
    size = 8
    serving = Serving(activation_dtype, max_decode_tokens=size)
    x = random_tokens(size)
    slots = torch.zeros(size, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            serving.run(x, slots)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        serving.run(x, slots)
    steps = []
    for count in (3, size, 1):
        own = serving.allocator.alloc(count)
        serving.pool.settle(wait=True)
        with no_synchronisation():
            x.copy_(torch.randn(size, HIDDEN, device="cuda", dtype=torch.bfloat16))
            # Padded as SGLang pads: with the dummy slot.
            slots.zero_()
            slots[:count].copy_(own)
            assert serving.recorder.begin(own, torch.full((count,), 9), is_decode=True)
            graph.replay()
            serving.recorder.end()
        steps.append((own, serving.reference(x), count))
    # A step of which nothing is recorded.
    serving.pool.settle(wait=True)
    kept = [t.clone() for t in (*serving.k, *serving.v)]
    slots.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for before, after in zip(kept, (*serving.k, *serving.v), strict=True):
        assert torch.equal(before[1:], after[1:])
    for own, expected, count in steps:
        found, seen = serving.recorded(own)
        assert (found.rows >= 0).all()
        assert_same(seen, expected, slice(0, count))


@in_both
def test_copies_on_the_host_are_the_rows_and_are_used_when_serving_takes_the_slots(
    activation_dtype,
):
    serving = Serving(activation_dtype, num_host_rows=64)
    x, slots = random_tokens(48), serving.allocator.alloc(48)
    serving.pool.settle(wait=True)
    assert serving.recorder.begin(slots, torch.arange(48))
    serving.run(x, slots)
    serving.recorder.end()
    serving.pool.settle(wait=True)
    with no_synchronisation():
        assert serving.pool.hedge(20) == 20
        assert serving.pool.hedge(20) == 20
    while serving.pool.hedge(20):
        pass
    serving.pool.settle(wait=True)
    assert serving.pool.num_hedged == 48
    found, _ = serving.recorded(slots)
    assert serving.allocator.alloc(serving.allocator.available_size()) is not None
    on_host = found.without(found.rows)
    assert (on_host.rows >= serving.view.num_device).all()
    expected = serving.reference(x)
    assert_same(serving.read(on_host), expected)
    # Layer by layer, as the backward pass does it, the copies ahead.
    rows = on_host.rows
    for layer in range(LAYERS - 1, -1, -1):
        serving.view.prefetch(layer, rows)
        out = torch.empty(48, 2 * INNER, dtype=torch.bfloat16, device="cuda")
        serving.view.fetch(layer, "gate_up", rows, out)
        assert torch.equal(out, expected[layer, "gate_up"])


@in_both
def test_a_prefill_that_finds_no_slots_is_recorded_on_the_host(activation_dtype):
    serving = Serving(activation_dtype, num_host_rows=64)
    slots = serving.allocator.alloc(serving.allocator.available_size())[:40]
    x = random_tokens(40)
    serving.pool.settle(wait=True)
    for _ in range(2):
        # Compiled by the first pass.
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.synchronize()
            assert serving.recorder.begin(slots, torch.arange(40))
            plain = serving.run(x, slots)
            serving.recorder.end()
            # The next pass is on its way before the copy is complete.
            serving.run(random_tokens(40), slots)
        torch.cuda.synchronize()
        serving.pool.settle(wait=True)
    found, seen = serving.recorded(slots)
    assert (found.rows >= serving.view.num_device).all()
    assert_same(seen, serving.reference(x))
    assert torch.equal(plain, serving.run(x, slots))


def test_rows_overwritten_after_they_were_enqueued_to_be_read_are_found_out():
    world = World(device="cuda", host_rows=0)
    slots = world.serve(2)
    world.pool.settle(wait=True)
    world.record(slots)
    world.pool.settle(wait=True)
    world.pool.finish("a", slots.cpu(), 2, 0.0)
    found = as_recorded(world.pool.check_out("a", slots.cpu(), 2))
    assert len(world.read(found)) == 2
    rows = found.rows
    world.view.check(rows, found.gens)
    # The end has begun and is not settled: the proof may not be given before.
    world.allocator.free(slots)
    assert world.pool.arrivals.counts[0] > world.pool.arrivals.counts[1]
    world.pool.settle(wait=True)
    with pytest.raises(RuntimeError, match="revoked"):
        world.view.confirm()
