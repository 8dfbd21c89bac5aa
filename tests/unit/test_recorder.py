"""What a forward pass leaves is copied later: into the rows that still are what they were, and nowhere else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pool_support import SIZE, World, as_recorded, bare_model

from alchemist.server.appraisal import Text
from alchemist.server.recorder import Recorder


def recorder_of(world, **options):
    return Recorder(bare_model(), world.layout, world.pool, **options)


def forward(recorder, world, slots, which=None, *, is_decode=False, first=1.0):
    """A pass over `slots`; token i's activations are `first` + i in the first layer, a half more in the second."""
    assert recorder.begin(slots, torch.arange(slots.numel()), which, is_decode=is_decode)
    tokens = first + torch.arange(slots.numel())[:, None]
    for layer in range(2):
        for field, width in world.layout.widths.items():
            if field not in ("keys", "values"):
                recorder._write(layer, field, (tokens + layer / 2).expand(-1, width))
    recorder.end()


def found(world, slots):
    world.pool.finish("a", slots, slots.numel(), 0.0)
    return as_recorded(world.pool.check_out("a", slots, slots.numel()))


ANSWERED = [7, 8, 9, 10]


def text_of(token_ids, extra_key):
    return Text(np.array(token_ids, np.int32), extra_key)


@pytest.mark.parametrize("host_rows", [0, 20])
def test_rows_are_there_after_a_flush(host_rows):
    """On the device, and beyond it on the host."""
    world = World(host_rows=host_rows)
    recorder, slots = recorder_of(world), world.serve(14)
    forward(recorder, world, slots)
    recorder.flush()
    seen = world.read(found(world, slots))
    assert [value for value, _ in seen] == list(range(1, len(seen) + 1))
    assert [key for _, key in seen] == slots[: len(seen)].tolist()
    assert len(seen) == 14 if host_rows else 0 < len(seen) < 14


@pytest.mark.parametrize(("busy_share", "is_recorded"), [(0.5, False), (1.0, True)])
def test_what_finds_no_room_while_requests_run_is_not_recorded(
    monkeypatch, busy_share, is_recorded
):
    """Nobody waits for a copy, unless all is to be recorded."""
    world = World(host_rows=0)
    recorder, slots = recorder_of(world, busy_share=busy_share), world.serve(7)
    token_bytes = world.layout.row_bytes
    monkeypatch.setattr("alchemist.server.recorder.KEEP_BYTES", 6 * token_bytes)
    forward(recorder, world, slots[:5])
    positions = torch.arange(2)
    assert recorder.begin(slots[5:], positions) == is_recorded
    recorder.release()
    if not is_recorded:
        recorder.flush()
        assert [value for value, _ in world.read(found(world, slots))] == [1, 2, 3, 4, 5]
        forward(recorder, world, slots[5:])


def test_copying_while_requests_run_keeps_to_its_share(monkeypatch):
    """Half of the time is for copies; each of the two layers' takes 0.6 s, which is owed afterwards."""
    clock = [0.0]
    module = "alchemist.server.recorder"
    monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(f"{module}.SAVED_S", 10.0)
    world = World(host_rows=0)
    recorder, slots = recorder_of(world, busy_share=0.5), world.serve(4)
    forward(recorder, world, slots)
    monkeypatch.setattr(f"{module}.KEEP_BYTES", world.layout.row_bytes)
    copied = []
    write = world.pool.write

    def slowly(layer, field, *args):
        if layer not in copied:
            copied.append(layer)
            clock[0] += 0.6
        write(layer, field, *args)

    monkeypatch.setattr(world.pool, "write", slowly)
    recorder.relieve()
    assert copied == []
    clock[0] = 0.1
    recorder.relieve()
    assert copied == [0], "one that there was time for, and no more"
    clock[0] += 0.4
    recorder.relieve()
    assert copied == [0], "what was overdrawn is not paid back"
    clock[0] += 0.5
    recorder.relieve()
    assert copied == [0, 1]
    assert [value for value, _ in world.read(found(world, slots))] == [1, 2, 3, 4]


def test_only_the_wanted_tokens_are_recorded():
    world = World(host_rows=0)
    recorder, slots = recorder_of(world), world.serve(5)
    forward(recorder, world, slots, torch.tensor([1, 4]))
    recorder.flush()
    rows = found(world, slots)
    assert (rows.rows >= 0).tolist() == [False, True, False, False, True]
    assert [value for value, _ in world.read(rows)] == [2, 5]


def test_slots_that_serving_took_back_are_not_written():
    world = World(host_rows=0)
    recorder, slots = recorder_of(world), world.serve(3)
    forward(recorder, world, slots)
    assert world.serve(SIZE - 3) is not None
    before = [buffer.clone() for buffer in (*world.k, *world.v)]
    recorder.flush()
    assert all(torch.equal(a, b) for a, b in zip(before, (*world.k, *world.v), strict=True)), (
        "a recorded row was written into serving's keys or values"
    )


def test_some_rows_of_a_pass_may_have_ended():
    world = World(host_rows=0)
    recorder, slots = recorder_of(world), world.serve(5)
    forward(recorder, world, slots)
    world.allocator.free(slots[1:3])
    forward(recorder, world, world.serve(1))
    recorder.flush()
    left = slots[[0, 3, 4]]
    assert [value for value, _ in world.read(found(world, left))] == [1, 4, 5]


@pytest.mark.parametrize("host_rows", [0, 20])
def test_decode_steps_begin_their_rows_together(host_rows):
    """Two requests at once, the second one not recorded; then more tokens than there is room for on the device."""
    world = World(host_rows=host_rows)
    recorder, slots = recorder_of(world), world.serve(26)
    for step in range(13):
        pair = slots[2 * step : 2 * step + 2]
        forward(recorder, world, pair, torch.tensor([0]), is_decode=True, first=10.0 * step)
        assert (world.pool.gens == 0).all(), "a row has begun"
    own = slots[::2]
    recorder.flush()
    world.pool.check_integrity()
    rows = found(world, own)
    seen = world.read(rows)
    assert [value for value, _ in seen] == [10.0 * step for step in range(len(seen))]
    assert [key for _, key in seen] == own[: len(seen)].tolist()
    assert len(seen) == 13 if host_rows else 0 < len(seen) < 13
    assert world.pool.num_held("b", slots[1::2], 13) == 0


@pytest.mark.parametrize("what", ["free", "clear", "serve", "answer", "check_out"])
def test_tokens_that_wait_for_their_rows_may_be_looked_at_or_gone(what):
    world = World(host_rows=0)
    recorder, slots = recorder_of(world), world.serve(4)
    for step in range(4):
        forward(recorder, world, slots[step : step + 1], is_decode=True, first=step)
    left = [0.0, 1.0, 2.0, 3.0]
    if what == "free":
        world.allocator.free(slots[1:3])
        slots, left = slots[[0, 3]], [0.0, 3.0]
    elif what == "clear":
        world.allocator.clear()
        left = []
    elif what == "serve":
        # All of it: rows that wait may not take what serving has asked for.
        assert world.serve(SIZE - 4) is not None
        left = []
    elif what == "answer":
        world.pool.finish("a", slots, 4, 0.0)
    else:
        assert world.pool.num_held("a", slots, 4) == 4
    world.pool.check_integrity()
    recorder.flush()
    rows = found(world, slots)
    assert [value for value, _ in world.read(rows)] == left
    world.pool.check_integrity()


def test_rows_begin_late_where_serving_has_taken_back_what_was_ready():
    world = World(host_rows=0)
    recorder, slots = recorder_of(world), world.serve(8)
    forward(recorder, world, slots)
    recorder.flush()
    own = world.serve(1)
    world.allocator.free(slots[:2])
    # The next slots come back from rows that were made ready for it, first of those that nobody has.
    assert world.serve(world.num_free) is not None
    world.pool.prepare()
    taken = world.serve(3)
    forward(recorder, world, own, is_decode=True, first=50.0)
    recorder.flush()
    assert not {*taken.tolist()} & {*world.pool.device.cells[world.pool.device.spare.all()].ravel()}
    world.pool.check_integrity()
    assert [value for value, _ in world.read(found(world, own))] in ([50.0], [])


def tapped():
    """(world, recorder, a linear that it taps, an output of one token)."""
    world = World(host_rows=0)
    model = bare_model()
    recorder = Recorder(model, world.layout, world.pool)
    output = torch.arange(float(world.layout.widths["gate_up"]))[None]
    return world, recorder, model.model.layers[1].mlp.gate_up_proj, output


def test_a_module_is_tapped_while_it_is_recorded_only():
    world, recorder, linear, output = tapped()
    slots = world.serve(2)
    assert recorder.begin(slots[:1], torch.arange(1), is_decode=True)
    assert linear((output,))[0] is output
    recorder.end()
    linear((output + 1,))
    recorder.flush()
    (row,) = found(world, slots[:1]).rows.tolist()
    stored = torch.empty_like(output)
    world.view.fetch(1, "gate_up", torch.tensor([row]), stored)
    assert torch.equal(stored, output)


def test_a_tap_passes_on_what_has_the_modules_place():
    """Of a batch with an adapter its weights: before, while and after it is recorded."""
    world, recorder, linear, output = tapped()

    def adapted(x):
        return (x[0] + 1,)

    slots = world.serve(2)
    for i, expected in enumerate((output + 1, output)):
        if i == 0:
            vars(linear)["forward"] = adapted
        assert recorder.begin(slots[i : i + 1], torch.tensor([i]), is_decode=True)
        assert torch.equal(linear((output,))[0], expected)
        recorder.end()
        assert vars(linear).get("forward") is (adapted if i == 0 else None)
        vars(linear).pop("forward", None)
    recorder.flush()
    rows = found(world, slots).rows
    stored = torch.empty(2, output.shape[1])
    world.view.fetch(1, "gate_up", rows, stored)
    assert torch.equal(stored, torch.cat([output + 1, output]))


def test_a_token_may_leave_the_cache_before_its_row_on_the_host_is_copied():
    """Its completion has ended and wants the row: keys and values are copied before others are written there."""
    world = World(host_rows=20)
    recorder, slots = recorder_of(world), world.serve(14)
    forward(recorder, world, slots)
    on_host = world.pool.record_of_slot[slots.numpy()]
    world.pool.finish("a", slots, 14, 0.0)
    keys = slots.tolist()
    world.allocator.free(slots)
    assert world.serve(SIZE) is not None
    recorder.flush()
    world.pool.check_integrity()
    found = as_recorded(world.pool.check_out("a", slots[:0], 14))
    held = (found.rows >= 0).nonzero().flatten().tolist()
    assert held, "none was on the host"
    assert len(held) < len(on_host), "none was on the device"
    seen = world.read(found)
    assert [value for value, _ in seen] == [1.0 + i for i in held]
    assert [key for _, key in seen] == [keys[i] for i in held]


def test_what_is_kept_is_copied_a_layer_at_a_time():
    world = World(host_rows=0)
    recorder, slots = recorder_of(world), world.serve(5)
    forward(recorder, world, slots[:3])
    forward(recorder, world, slots[3:], first=4.0)
    assert [recorder.flush_some() for _ in range(5)] == [True] * 4 + [False]
    assert [value for value, _ in world.read(found(world, slots))] == [1, 2, 3, 4, 5]


def test_rows_may_end_between_two_layers():
    world = World(host_rows=0)
    recorder, slots = recorder_of(world), world.serve(3)
    forward(recorder, world, slots)
    recorder.flush_some()
    world.allocator.free(slots[1:2])
    recorder.flush_some()
    left = slots[[0, 2]]
    assert [value for value, _ in world.read(found(world, left))] == [1, 3]
    assert not recorder.flush_some()


def test_no_more_is_kept_than_the_limit(monkeypatch):
    """Half of it is left for the next batch; one that does not fit is copied at once."""
    world = World(host_rows=20)
    recorder, slots = recorder_of(world), world.serve(14)
    row_bytes = world.layout.row_bytes
    monkeypatch.setattr("alchemist.server.recorder.KEEP_BYTES", 8 * row_bytes)
    forward(recorder, world, slots[:3])
    recorder.relieve()
    assert recorder.flush_some(), "it had room for them"
    forward(recorder, world, slots[3:5], first=4.0)
    recorder.relieve()
    assert [recorder.flush_some() for _ in range(3)] == [True, True, False], "the older went"
    forward(recorder, world, slots[5:], first=6.0)
    assert not recorder.flush_some(), "what is too much was kept"
    assert [value for value, _ in world.read(found(world, slots))] == list(range(1, 15))


def test_nothing_is_held_of_a_prompt_whose_rows_have_ended():
    world = World(host_rows=0)
    recorder, slots = recorder_of(world), world.serve(4)
    forward(recorder, world, slots)
    world.allocator.free(slots)
    recorder.flush()
    assert not recorder._batch.values
    assert recorder._num_kept_bytes == 0


@pytest.mark.parametrize(
    ("other", "num_left"),
    [
        ((ANSWERED, "v1"), 4),
        (([7, 8, 9], "v1"), 3),
        (([*ANSWERED, 11], "v1"), 4),
        (([7, 8, 3, 10], "v1"), 2),
        (([1, 8, 9, 10], "v1"), 0),
        ((ANSWERED, "v2"), 0),
    ],
)
def test_rows_under_an_id_that_is_used_again_are_of_its_own_text_only(other, num_left):
    world = World(host_rows=0)
    recorder, slots = recorder_of(world), world.serve(4)
    forward(recorder, world, slots)
    recorder.flush()
    world.pool.finish("a", slots, 4, 0.0, "v1", text_of(ANSWERED, "v1"))
    asked = text_of(*other)
    found = world.pool.check_out("a", slots[:0], asked.token_ids.size, asked)
    assert (found.rows >= 0).sum() == num_left
    assert (found.rows[:num_left] >= 0).all()
