"""Rows with `gate_up` in eight bits: how long they are, that every place holds the same bits, and what is refused."""

import numpy as np
import pytest
import torch
from pool_support import SIZE, World, as_recorded, bare_model

from alchemist.kernels import fp8_rows
from alchemist.protocol.layout import DTYPE_BYTES, RowLayout
from alchemist.server.config import Config
from alchemist.server.gpu_recorder import GpuRecorder
from alchemist.server.options import parse
from alchemist.server.recorder import KEEP_BYTES, Recorder

ORDER = ("x", "q", "attn", "mid", "gate_up")


def layout_8b(dtype="bfloat16", **changes):
    """Llama-3.1-8B's rows."""
    sizes = {
        "num_layers": 32,
        "hidden_size": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "has_qk_norm": False,
        "cell": 1024,
    }
    return RowLayout(**(sizes | {"dtype": dtype} | changes))


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("inner", [14336, 6])
def test_a_field_is_as_wide_as_its_encoding(dtype, inner):
    plain, narrow = (
        layout_8b(dtype, intermediate_size=inner, activation_dtype=name) for name in ("auto", "fp8")
    )
    assert narrow.widths == plain.widths
    assert {n: w for n, (_, w) in plain.fields.items()} == plain.widths
    encoded = fp8_rows.encode(torch.randn(2, 2 * inner, dtype=getattr(torch, dtype)))
    assert narrow.fields["gate_up"][1] == encoded.shape[1]
    others = set(plain.fields) - {"gate_up", "keys", "values"}
    assert all(narrow.fields[name] == plain.fields[name] for name in others)
    for found in (plain, narrow):
        # Its cells on the device are all of it, in order, and the row's cells have room for them.
        start, width = found.fields["gate_up"]
        parts = found.parts("gate_up")
        assert parts[0].offset == 0
        assert sum(p.num_cells for p in parts) == -(-width // found.cell)
        assert found.fields["keys"][0] >= start + width
        assert found.fields["keys"][0] <= 2 * found.slots_per_row * found.cell


def test_a_row_of_an_8b_model_takes_two_thirds():
    plain, narrow = layout_8b(), layout_8b(activation_dtype="fp8")
    # Cells: x, q, attn and mid 4 each; gate_up 28, or 14 and one for the scale; keys and values.
    assert plain.row_bytes == 32 * 2 * 1024 * (16 + 28 + 2)
    assert narrow.row_bytes == 32 * 2 * 1024 * (16 + 15 + 2)
    assert (plain.slots_per_row, narrow.slots_per_row) == (22, 16)


def values_of(world, num_tokens, seed=0):
    """Random activations by layer and field, of very different sizes by token."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, num_tokens)[:, None]
    return {
        (layer, field): torch.randn(num_tokens, world.layout.widths[field], generator=generator)
        * sizes
        for layer in range(2)
        for field in ORDER
    }


def rounded(value):
    out = torch.empty_like(value)
    fp8_rows.decode(fp8_rows.encode(value), out)
    return out


def assert_holds(world, found, values):
    """What the trainer's view finds in `found` is what was recorded, bit by bit but for `gate_up`'s rounding."""
    tokens = torch.nonzero(found.rows >= 0).flatten()
    assert tokens.numel()
    rows = found.rows[tokens]
    for (layer, field), value in values.items():
        out = torch.full((rows.numel(), value.shape[1]), float("nan"))
        world.view.fetch(layer, field, rows, out)
        expected = rounded(value) if field == "gate_up" else value
        assert torch.equal(out, expected[tokens]), (layer, field)
    world.view.check(rows, found.gens[tokens])
    world.view.confirm()


def record(world, slots, values):
    """A prefill of the tokens in `slots`, as serving's recorder for the device has it."""
    if world.pool.arrivals.is_deferred:
        recorder = GpuRecorder(bare_model(), world.layout, world.pool, max_decode_tokens=0)
        take = recorder._take
    else:
        recorder = Recorder(bare_model(), world.layout, world.pool)
        take = recorder._write
    world.pool.settle(wait=True)
    assert recorder.begin(slots, torch.arange(slots.numel()))
    for (layer, field), value in values.items():
        take(layer, field, value.clone())
    recorder.end()
    recorder.flush()
    world.pool.settle(wait=True)
    world.pool.finish("a", slots, slots.numel(), 0.0)
    return as_recorded(world.pool.check_out("a", slots, slots.numel()))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("is_deferred", [False, True], ids=["cpu", "as on a gpu"])
def test_rows_hold_what_was_recorded_on_both_tiers(is_deferred, page_size, kv_dtype):
    world = World(
        page_size,
        host_rows=4,
        kv_dtype=kv_dtype,
        activation_dtype="fp8",
        is_deferred=is_deferred,
    )
    slots = world.serve(3)[:3]
    values = values_of(world, 3)
    found = record(world, slots, values)
    on_device = found.rows[found.rows >= 0] < world.view.num_device
    assert on_device.any()
    assert_holds(world, found, values)
    while world.pool.hedge(4):
        pass
    world.pool.settle(wait=True)
    copied = as_recorded(world.pool.check_out("a", slots, 3))
    on_host = copied.without(copied.rows[copied.rows < world.view.num_device])
    assert (on_host.rows >= world.view.num_device).any()
    assert_holds(world, on_host, values)
    world.pool.check_integrity()


@pytest.mark.parametrize("is_deferred", [False, True], ids=["cpu", "as on a gpu"])
def test_what_finds_no_slot_is_on_the_host_in_eight_bits(is_deferred):
    world = World(host_rows=4, activation_dtype="fp8", is_deferred=is_deferred)
    slots = world.serve(SIZE)
    values = values_of(world, 4)
    found = record(world, slots[:4], values)
    assert (found.rows >= world.view.num_device).all()
    assert_holds(world, found, values)


def test_more_rows_fit_into_the_same_cache():
    held = {}
    for name in ("auto", "fp8"):
        world = World(host_rows=0, activation_dtype=name)
        slots = world.serve(8)
        record(world, slots, values_of(world, 8))
        held[name] = world.pool.num_held("a", slots, 8)
    assert held["fp8"] > held["auto"] > 0


def test_tensors_that_are_kept_are_counted_as_the_model_has_them():
    """They wait as they came: what is deferred may not take more memory because rows take less."""
    plain, narrow = (
        Recorder(bare_model(), world.layout, world.pool)
        for world in (World(), World(activation_dtype="fp8"))
    )
    assert narrow._token_bytes == plain._token_bytes < KEEP_BYTES


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="--activation-dtype is 'int8'; allowed: one of auto, fp8"):
        Config(activation_dtype="int8")


def test_the_option_is_read_and_refused_in_words(capsys):
    assert parse(["--activation-dtype", "fp8"], {})[0].activation_dtype == "fp8"
    assert parse([], {"ALCHEMIST_ACTIVATION_DTYPE": "fp8"})[0].activation_dtype == "fp8"
    assert parse([], {})[0].activation_dtype == "auto"
    with pytest.raises(SystemExit):
        parse(["--activation-dtype", "fp16"], {})
    assert "--activation-dtype is 'fp16'; allowed: one of auto, fp8" in capsys.readouterr().err


def test_a_model_whose_rows_have_no_place_for_the_scale_is_refused():
    with pytest.raises(
        ValueError, match=r"activation_dtype is 'fp8'.* even intermediate_size, not 7"
    ):
        layout_8b(intermediate_size=7, activation_dtype="fp8")
    assert layout_8b(intermediate_size=7).fields["gate_up"][1] == 14


def test_no_bit_changes_on_the_way():
    """Codes are bytes: those that as numbers would be NaNs or denormal are carried like the others."""
    world = World(host_rows=2, activation_dtype="fp8")
    width = world.layout.fields["gate_up"][1]
    patterns = torch.tensor(
        [[0x7F800001, 0x00000001, -1], [0x7FFFFFFF, -(2**31), 0x00400000]], dtype=torch.int32
    )
    assert patterns.shape[1] == width
    device, host = world.pool.device, world.pool.host
    device.borrow(2)
    rows = device.take(2)
    device.write(0, "gate_up", rows, patterns.view(torch.float32))
    host.write(0, "gate_up", np.arange(2), patterns.view(torch.float32))
    for found in (torch.from_numpy(rows), world.view.num_device + torch.arange(2)):
        out = torch.empty(2, width)
        world.view._read(0, "gate_up", found, out)
        assert torch.equal(out.view(torch.int32), patterns)
