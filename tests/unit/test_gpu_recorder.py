"""Recording as on a GPU, on tensors of the CPU: rows by number, in a tensor the kernels read, known when complete."""

import numpy as np
import pytest
import torch
from pool_support import SIZE, World, as_recorded, bare_model

from alchemist.server.gpu_recorder import GpuRecorder
from alchemist.trainer.rows import RowsRevoked

ORDER = ("x", "q", "attn", "mid", "gate_up")
"""In which a layer's activations come by."""


def recorder_of(world, max_decode_tokens=0):
    return GpuRecorder(bare_model(), world.layout, world.pool, max_decode_tokens=max_decode_tokens)


def run(recorder, world, num_tokens):
    """The layers' activations go by; token i's are i + 1 in the first layer, a half more in the second."""
    tokens = torch.arange(1.0, num_tokens + 1)[:, None]
    for layer in range(2):
        for field in ORDER:
            width = world.layout.widths[field]
            recorder._take(layer, field, (tokens + layer / 2).repeat(1, width))


def begin(recorder, world, slots, which=None, **kind):
    # As before every pass: slots that were borrowed anew are known.
    world.pool.settle(wait=True)
    return recorder.begin(slots, torch.arange(slots.numel()), which, **kind)


def forward(recorder, world, slots, which=None, padding=0, **kind):
    is_recorded = begin(recorder, world, slots, which, **kind)
    run(recorder, world, slots.numel() + padding)
    if is_recorded:
        recorder.end()
    return is_recorded


def found(world, slots):
    world.pool.settle(wait=True)
    world.pool.finish("a", slots, slots.numel(), 0.0)
    return as_recorded(world.pool.check_out("a", slots, slots.numel()))


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_prefills_rows_hold_its_activations(page_size):
    world = World(page_size, is_deferred=True)
    recorder, slots = recorder_of(world), world.serve(3)
    assert forward(recorder, world, slots)
    rows = found(world, slots)
    count = int((rows.rows >= 0).sum())
    assert count == min(slots.numel(), recorder.num_recorded) > 0
    assert [value for value, _ in world.read(rows)] == list(range(1, count + 1))


def test_only_the_wanted_tokens_are_recorded():
    world = World(is_deferred=True)
    recorder, slots = recorder_of(world), world.serve(5)
    assert forward(recorder, world, slots, torch.tensor([1, 4]))
    rows = found(world, slots)
    assert (rows.rows >= 0).tolist() == [False, True, False, False, True]
    assert [value for value, _ in world.read(rows)] == [2, 5]


def test_rows_are_known_when_the_pass_is_complete_and_not_before():
    world = World(is_deferred=True)
    recorder, slots = recorder_of(world), world.serve(2)
    assert begin(recorder, world, slots)
    run(recorder, world, 2)
    world.pool.arrivals.settle(wait=True)
    assert world.pool.num_held("a", slots, 2) == 0
    recorder.end()
    world.pool.settle(wait=True)
    assert world.pool.num_held("a", slots, 2) == 2


def test_decode_steps_have_their_rows_in_one_tensor():
    """As a captured graph has it: the same tensor in every step, padded with tokens that have no row."""
    world = World(is_deferred=True)
    recorder = recorder_of(world, max_decode_tokens=4)
    captured = recorder._rows
    slots = world.serve(2)
    assert forward(recorder, world, slots, padding=2, is_decode=True)
    assert recorder._rows is captured
    assert captured.tolist() == [-1] * 4
    assert [value for value, _ in world.read(found(world, slots))] == [1, 2]


def test_a_replay_of_which_nothing_is_recorded_writes_nothing():
    world = World(is_deferred=True)
    recorder = recorder_of(world, max_decode_tokens=4)
    assert forward(recorder, world, world.serve(2), is_decode=True)
    world.pool.settle(wait=True)
    before = [buffer.clone() for buffer in (*world.k, *world.v)]
    run(recorder, world, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, (*world.k, *world.v), strict=True))


def test_a_prefill_passes_the_taps_of_decode_recording():
    world = World(is_deferred=True)
    recorder = recorder_of(world, max_decode_tokens=2)
    slots = world.serve(4)
    assert forward(recorder, world, slots)
    assert [value for value, _ in world.read(found(world, slots))] == [1, 2, 3, 4]
    # One that is not recorded, longer than any decode step.
    run(recorder, world, 7)


def test_rows_whose_slots_serving_took_back_are_not_found():
    world = World(host_rows=0, is_deferred=True)
    recorder, slots = recorder_of(world), world.serve(3)
    assert forward(recorder, world, slots)
    world.allocator.free(slots[1:2])
    rows = found(world, slots)
    assert (rows.rows >= 0).tolist() == [True, False, True]


def test_a_row_that_serving_ends_before_its_slot_is_known_stays_ended():
    world = World(host_rows=0, is_deferred=True)
    recorder, slots = recorder_of(world), world.serve(3)
    assert forward(recorder, world, slots)
    assert world.serve(SIZE - 3) is not None
    world.pool.settle(wait=True)
    world.pool.check_integrity()
    assert (world.pool.record_of_slot == -1).all()
    assert world.pool.num_held("a", slots, 3) == 0


def test_keys_overwritten_before_their_rows_end_is_settled_are_not_believed():
    world = World(host_rows=0, is_deferred=True)
    recorder, slots = recorder_of(world), world.serve(3)
    assert forward(recorder, world, slots)
    rows = found(world, slots)
    world.allocator.free(slots)
    # The same slots, in another order of tokens: other keys.
    world.serve(3)
    for buffer in (*world.k, *world.v):
        buffer[slots] += 100
    assert (world.pool.gens[rows.rows.numpy()] == rows.gens.numpy()).all()
    with pytest.raises(RowsRevoked) as revoked:
        world.read(rows)
    assert sorted(revoked.value.rows) == sorted(rows.rows.tolist())


def test_what_cannot_be_recorded_is_said_after_the_pass_and_not_in_it():
    world = World(is_deferred=True)
    recorder, slots = recorder_of(world), world.serve(2)
    assert begin(recorder, world, slots)
    recorder._take(0, "x", torch.zeros(2, 3, dtype=torch.float64))
    recorder._take(0, "q", torch.zeros(2, 4, dtype=torch.float64))
    run(recorder, world, 2)
    with pytest.raises(ValueError, match="float64"):
        recorder.end()
    # As the engine does it then.
    recorder.release()
    world.pool.stop("as asked")
    world.pool.settle(wait=True)
    world.pool.check_integrity()
    assert world.pool.num_held("a", slots, 2) == 0
    assert world.allocator.available_size() == SIZE - 2


def test_a_graph_finds_no_rows_when_recording_has_ended():
    world = World(is_deferred=True)
    recorder = recorder_of(world, max_decode_tokens=4)
    assert begin(recorder, world, world.serve(2), is_decode=True)
    recorder.release()
    assert world.pool.device.kept[0].tolist() == [-1] * 4


def test_what_finds_no_slot_goes_to_the_host_when_the_pass_is_complete():
    """Serving has all of the KV cache but for one row's slots."""
    world = World(host_rows=8, is_deferred=True)
    recorder = recorder_of(world)
    slots = world.serve(SIZE - world.layout.slots_per_row)
    assert forward(recorder, world, slots[:5])
    world.pool.settle(wait=True)
    world.pool.check_integrity()
    rows = found(world, slots[:5])
    assert sorted((rows.rows >= world.view.num_device).tolist()) == [False, True, True, True, True]
    assert [value for value, _ in world.read(rows)] == [1, 2, 3, 4, 5]
    assert [key for _, key in world.read(rows)] == slots[:5].tolist()
    # Their tokens leave the cache; the copies stay, for the answer that wants them.
    world.allocator.free(slots[:5])
    world.pool.settle(wait=True)
    world.pool.check_integrity()
    left = as_recorded(world.pool.check_out("a", slots[:0], 5))
    assert [value for value, _ in world.read(left)] == [2, 3, 4, 5]


def test_staged_rows_are_not_found_before_they_are_on_the_host():
    world = World(host_rows=8, is_deferred=True)
    recorder, slots = recorder_of(world), world.serve(SIZE)
    assert forward(recorder, world, slots[:3])
    # The pass is complete and its slots are known; the copy is not.
    world.pool.arrivals.settle(wait=True)
    assert world.pool.num_held("a", slots[:3], 3) == 0
    # Nor does another pass get in between.
    assert not recorder.begin(slots[3:5], torch.arange(2))
    world.pool.settle(wait=True)
    assert world.pool.num_held("a", slots[:3], 3) == 3
    assert forward(recorder, world, slots[3:5])


def test_a_staged_row_whose_slot_is_freed_before_it_is_on_the_host_is_nobodys():
    world = World(host_rows=8, is_deferred=True)
    recorder, slots = recorder_of(world), world.serve(SIZE)
    assert forward(recorder, world, slots[:3])
    world.allocator.free(slots[1:2])
    again = world.serve(1)
    assert again.tolist() == slots[1:2].tolist()
    world.pool.settle(wait=True)
    world.pool.check_integrity()
    assert (found(world, slots[:3]).rows >= 0).tolist() == [True, False, True]


def test_a_copy_counts_only_if_its_row_still_is_what_it_was():
    world = World(host_rows=4, is_deferred=True)
    recorder, slots = recorder_of(world), world.serve(2)
    assert forward(recorder, world, slots)
    world.pool.settle(wait=True)
    assert world.pool.hedge(4) == 2
    # Freed after the copy was begun, and before it was found complete.
    world.allocator.free(slots[:1])
    world.pool.settle(wait=True)
    world.pool.check_integrity()
    assert world.pool.num_hedged == 1
    rows = found(world, slots)
    assert (rows.hedge[0] >= 0).tolist() == [False, True]
    on_host = rows.without(rows.rows[rows.rows >= 0])
    assert [value for value, _ in world.read(on_host)] == [2]
    assert np.flatnonzero((on_host.rows >= 0).numpy()).tolist() == [1]
