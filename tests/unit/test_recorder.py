"""What a forward pass leaves is copied later: into the rows that still are what they were, and nowhere else."""

import pytest
import torch
from pool_support import SIZE, World, as_recorded, bare_model

from alchemist.server.recorder import Recorder


def recorder_of(world):
    return Recorder(bare_model(), world.layout, world.pool)


def forward(recorder, world, slots, which=None):
    """A pass over `slots`; token i's activations are i + 1 in the first layer, a half more in the second."""
    assert recorder.begin(slots, torch.arange(slots.numel()), which)
    tokens = torch.arange(1.0, slots.numel() + 1)[:, None]
    for layer in range(2):
        for field, width in world.layout.widths.items():
            if field not in ("keys", "values"):
                recorder._write(layer, field, (tokens + layer / 2).expand(-1, width))
    recorder.end()


def found(world, slots):
    world.pool.finish("a", slots, slots.numel(), 0.0)
    return as_recorded(world.pool.check_out("a", slots, slots.numel()))


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
