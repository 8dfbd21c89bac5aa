"""Adapters on a CPU: SGLang's own layers, against the products written out."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import alchemist.server.main  # noqa: F401  (before sglang)
from alchemist.server import cpu, cpu_lora

RANK, SCALING = 3, 0.7
UIDS = ("one", "two")


@pytest.fixture
def layers(monkeypatch):
    """q, k, v; gate and up; down: linears as the embedded model has them, with two adapters in SGLang's buffers."""
    for name in ("tensor", "zeros", "empty", "ones", "full", "arange"):
        monkeypatch.setattr(torch, name, getattr(torch, name))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.pin_memory)
    cpu.ignore_pin_memory()
    from sglang.srt.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from sglang.srt.lora import layers as wrappers
    from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend

    backend = TorchNativeLoRABackend(max_loras_per_batch=2, device=torch.device("cpu"))
    alone = {"tp_rank": 0, "tp_size": 1, "params_dtype": torch.float32}
    qkv = QKVParallelLinear(24, 8, 4, 2, bias=True, **alone)
    gate_up = MergedColumnParallelLinear(24, [40, 40], bias=False, **alone)
    down = RowParallelLinear(40, 24, bias=False, **alone)
    generator = torch.Generator().manual_seed(0)
    wrapped = {
        "qkv_proj": wrappers.QKVParallelLinearWithLoRA(qkv, backend),
        "gate_up_proj": wrappers.MergedColumnParallelLinearWithLoRA(gate_up, backend),
        "down_proj": wrappers.RowParallelLinearWithLoRA(down, backend),
    }
    for layer, slices in zip(wrapped.values(), (3, 2, 1), strict=True):
        for parameter in layer.base_layer.parameters():
            parameter.data.normal_(generator=generator)
        outputs, inputs = layer.base_layer.weight.shape
        # Wider than the adapter's rank, as where another one has a higher one.
        a = torch.randn(2, slices * (RANK + 1), inputs, generator=generator)
        b = torch.randn(2, outputs, RANK + 1, generator=generator)
        layer.set_lora_info(a, b)
    return wrapped


class Server:
    """What there is of SGLang's around its layers: which adapter is in which buffer, and the batch's requests."""

    def __init__(self, layers, monkeypatch):
        self.layers, self.lora = layers, cpu_lora.CpuLora()

        def apply_lora(layer, y, x):
            return self.lora.apply(None, layer, y, x)

        for layer in layers.values():
            # As the hook has it.
            monkeypatch.setattr(type(layer), "apply_lora", apply_lora)
        self.index = {uid: i for i, uid in enumerate(UIDS)}
        config = SimpleNamespace(r=RANK)
        backend = layers["qkv_proj"].lora_backend
        self.manager = SimpleNamespace(
            lora_backend=backend,
            lora_modules=[layers],
            loras={uid: SimpleNamespace(config=config, scaling=SCALING) for uid in (*UIDS, "new")},
            memory_pool=SimpleNamespace(get_buffer_id=lambda uid: self.index[uid]),
            embed_tokens_module=None,
            lm_head_module=None,
            reset_lora_batch=backend.reset_batch_state,
        )

    def begin(self, lora_ids, lengths):
        """A prefill of requests of these lengths."""
        mode = SimpleNamespace(
            is_decode=lambda: False, is_target_verify=lambda: False, is_extend=lambda: True
        )
        batch = SimpleNamespace(lora_ids=lora_ids, extend_seq_lens_cpu=lengths, forward_mode=mode)
        self.lora.prepare_batch(None, self.manager, batch)

    def outputs(self, lora_ids, lengths, name="qkv_proj"):
        """Of a prefill: (the layer's output, as the model calls it; what it should be)."""
        self.begin(lora_ids, lengths)
        layer = self.layers[name]
        x = torch.randn(sum(lengths), layer.base_layer.weight.shape[1])
        parts = zip(x.split(lengths), lora_ids, strict=True)
        expected = torch.cat([self._expected(layer, part, uid) for part, uid in parts])
        found, bias = layer(x)
        assert bias is None
        return found, expected

    def _expected(self, layer, x, uid):
        base = layer.base_layer
        y = torch.nn.functional.linear(x, base.weight, base.bias)
        if uid is None:
            return y
        is_qkv = hasattr(layer, "A_buffer_qkv")
        a = (layer.A_buffer_qkv if is_qkv else layer.A_buffer)[self.index[uid]]
        b = (layer.B_buffer_qkv if is_qkv else layer.B_buffer)[self.index[uid]]
        ends = layer.output_offset_cpu.tolist()
        for i, (start, end) in enumerate(pairwise(ends)):
            low = x @ a[i * RANK : (i + 1) * RANK].T
            y[:, start:end] += SCALING * low @ b[start:end, :RANK].T
        return y

    @property
    def num_copies(self):
        return len(self.lora._copies)


@pytest.fixture
def server(layers, monkeypatch):
    return Server(layers, monkeypatch)


BATCHES = [
    ([None, None], [2, 3]),
    (["one"], [5]),
    (["two", "two"], [1, 4]),
    (["one", "two"], [2, 3]),
    (["one", None], [2, 3]),
    ([None, "two", "one"], [300, 300, 2]),
]


@pytest.mark.parametrize("budget", [1 << 20, 0])
@pytest.mark.parametrize("name", ["qkv_proj", "gate_up_proj", "down_proj"])
def test_every_request_has_its_own_adapter(server, name, budget, monkeypatch):
    monkeypatch.setattr(cpu_lora, "MERGED_BYTES", budget)
    for lora_ids, lengths in BATCHES * 2:
        found, expected = server.outputs(lora_ids, lengths, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert server.num_copies == (2 if budget else 0)


@pytest.fixture
def asked(monkeypatch):
    """The linears whose product SGLang's own lines have asked for."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    found, apply = [], UnquantizedLinearMethod.apply

    def noting(method, base, x, bias=None):
        found.append(base)
        return apply(method, base, x, bias)

    monkeypatch.setattr(UnquantizedLinearMethod, "apply", noting)
    return found


@pytest.mark.parametrize("name", ["qkv_proj", "gate_up_proj", "down_proj"])
def test_where_nothing_is_to_be_added_a_linear_is_a_product(server, asked, name):
    for lora_ids, lengths in BATCHES * 2:
        asked.clear()
        found, expected = server.outputs(lora_ids, lengths, name)
        torch.testing.assert_close(found, expected)
        assert bool(asked) == (len(set(lora_ids)) > 1)


def test_what_is_more_than_a_product_stays_sglangs(server, asked):
    base = server.layers["gate_up_proj"].base_layer
    # Others have parts of its output.
    base.tp_size = 2
    for lora_ids in ([None], ["one"]):
        asked.clear()
        found, expected = server.outputs(lora_ids, [4], "gate_up_proj")
        torch.testing.assert_close(found, expected)
        assert asked == [base]
    assert server.num_copies == 0


def test_one_adapter_for_all_is_in_the_weights(server):
    server.begin(["one", "one"], [2, 3])
    assert server.num_copies == 1
    assert not any(layer.lora_active for layer in server.layers.values())
    server.begin(["one", "two"], [2, 3])
    assert all(layer.lora_active for layer in server.layers.values())
    server.begin([None], [2])
    assert not any(layer.lora_active for layer in server.layers.values())


def test_a_buffer_that_another_adapter_gets_is_merged_anew(server):
    server.outputs(["one"], [4])
    del server.index["one"]
    server.index["new"] = 0
    layer = server.layers["qkv_proj"]
    layer.B_buffer_qkv[0].normal_()
    found, expected = server.outputs(["new"], [4])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert server.num_copies == 1


def test_copies_stay_within_their_budget(server, monkeypatch):
    size = sum(layer.base_layer.weight.nbytes for layer in server.layers.values())
    monkeypatch.setattr(cpu_lora, "MERGED_BYTES", 2 * size - 1)
    for uid in (*UIDS, *UIDS):
        found, expected = server.outputs([uid], [4])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert server.num_copies == 1
    monkeypatch.setattr(cpu_lora, "MERGED_BYTES", size - 1)
    fresh = Server(server.layers, monkeypatch)
    fresh.begin(["one"], [4])
    assert fresh.num_copies == 0


def test_sixteen_bits_are_not_merged(server):
    for layer in server.layers.values():
        layer.base_layer.weight.data = layer.base_layer.weight.data.bfloat16()
    server.begin(["one"], [4])
    assert server.num_copies == 0
    assert all(layer.lora_active for layer in server.layers.values())
