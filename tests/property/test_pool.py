"""The activation pool against its model, and case by case."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from pool_machine import PoolMachine
from pool_support import SIZE, World, as_recorded

from alchemist.protocol.rows import ROW, RowEvent, RowState
from alchemist.trainer.rows import Recorded, RowsRevoked

PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def check_out(world: World, rid: str, slots: torch.Tensor) -> Recorded:
    return as_recorded(world.pool.check_out(rid, slots, slots.numel()))


def test_a_row_goes_on_from_its_copy_when_serving_takes_its_slots():
    world = World(host_rows=8)
    slots = world.serve(3)
    held = world.record(slots)
    world.pool.finish("a", slots, 3, 0.0)
    assert world.pool.hedge(8) == 3
    found = check_out(world, "a", slots)
    assert (found.rows < world.view.num_device).all()
    before = world.read(found)
    assert [v for v, _ in before] == list(held.values())
    # Everything else is serving's now: nothing is lent any more.
    assert world.serve(SIZE - 3) is not None
    # Without the check a reader would take serving's keys and values for activations.
    assert world.read(found, check=False) != before
    with pytest.raises(RowsRevoked) as revoked:
        world.read(found)
    found = found.without(torch.tensor(revoked.value.rows))
    assert (found.rows >= world.view.num_device).all()
    assert world.read(found) == before
    # The token itself leaves: keys and values come from the host, too.
    world.allocator.free(slots)
    world.serve(3)
    assert world.read(check_out(world, "a", slots[:0]).without(found.rows[:0])) == []
    out = as_recorded(world.pool.check_out("a", slots[:0], 3))
    assert world.read(out) == before


def test_rows_that_are_read_are_not_taken_for_others():
    world = World(host_rows=0)
    first = world.serve(2)
    world.record(first)
    world.pool.finish("a", first, 2, 0.0)
    out = world.pool.check_out("a", first, 2)
    room = world.pool.num_device_rows
    slots = world.serve(room)
    rows = world.pool.record(slots, torch.arange(room))
    assert set(rows).isdisjoint(out.rows)
    assert (world.pool.gens[out.rows] == out.gens).all()
    world.pool.check_in(out.ticket)
    world.pool.record(slots, torch.arange(room))
    world.pool.check_integrity()


def test_the_least_recently_used_rows_go_first():
    world = World(host_rows=0, eviction="lru", fraction=0.5)
    room = world.pool.num_device_rows
    assert room == 4
    a, b, c = world.serve(2), world.serve(2), world.serve(1)
    world.record(a)
    world.record(b)
    world.pool.finish("a", a, 2, 0.0)
    world.pool.check_in(world.pool.check_out("a", a, 2).ticket)
    world.record(c)
    assert (world.pool.record_of_slot[a.numpy()] >= 0).all()
    assert (world.pool.record_of_slot[b.numpy()] >= 0).sum() == 1


def test_rows_of_answers_that_will_not_be_voted_on_go_first():
    world = World(host_rows=0, fraction=0.5)
    a, b, c = world.serve(2), world.serve(2), world.serve(2)
    world.record(a)
    world.record(b)
    # The older answer has a vote that waits to be trained; the newer one's was trained.
    world.pool.finish("a", a, 2, 0.0)
    world.pool.finish("b", b, 2, 50.0)
    world.pool.voted("a", 60.0)
    world.pool.voted("b", 60.0)
    world.pool.consumed("b", 60.5)
    world.pool.appraise(61.0)
    world.record(c)
    assert (world.pool.record_of_slot[a.numpy()] >= 0).all()
    assert (world.pool.record_of_slot[b.numpy()] == -1).all()


def test_rows_of_answers_too_old_to_be_trained_from_go_first():
    world = World(host_rows=0, fraction=0.5)
    a, b, c = world.serve(2), world.serve(2), world.serve(2)
    world.record(a)
    world.record(b)
    # Both have a vote that waits; the newer answer's version has become too old meanwhile.
    world.pool.finish("a", a, 2, 0.0, "v2")
    world.pool.finish("b", b, 2, 50.0, "v1")
    for rid in "ab":
        world.pool.voted(rid, 60.0)
    world.pool.keep_fresh(["v1", "v2"], 60.0)
    world.pool.keep_fresh(["v2", "v3"], 60.0)
    world.pool.appraise(61.0)
    world.record(c)
    assert (world.pool.record_of_slot[a.numpy()] >= 0).all()
    assert (world.pool.record_of_slot[b.numpy()] == -1).all()
    # One that ends now is as old.
    world.pool.finish("c", c, 2, 62.0, "v1")
    world.pool.voted("c", 63.0)
    world.pool.appraise(64.0)
    d = world.serve(2)
    world.record(d)
    assert (world.pool.record_of_slot[a.numpy()] >= 0).all()
    assert (world.pool.record_of_slot[c.numpy()] == -1).all()


@pytest.mark.parametrize("num_taken", [0, 1, 3])
def test_what_is_ready_stays_so_when_slots_are_freed_in_the_same_loop(num_taken, monkeypatch):
    world = World(host_rows=6)
    own, other = world.serve(2), world.serve(2)
    world.record(own)
    world.record(other)
    world.pool.finish("a", own, 2, 0.0)
    out = world.pool.check_out("a", own, 2)
    world.pool.check_in(out.ticket)
    world.serve(world.num_free)
    world.pool.prepare()
    taken = [world.serve(1) for _ in range(num_taken)]
    # As when the radix tree is evicted: rows of tokens become spare that are ready, or have been taken already.
    world.allocator.free(other)
    world.allocator.free(own[:1])
    monkeypatch.setattr(world.pool, "_evict", lambda *_, **__: pytest.fail("a search for rows"))
    rest = world.serve(world.allocator.available_size())
    assert rest is not None
    monkeypatch.undo()
    every = torch.cat([rest, *taken, own[1:]])
    assert len(set(every.tolist())) == every.numel()
    assert (world.pool.gens[out.rows] != out.gens).all()
    world.pool.check_integrity()


def test_from_the_next_loop_on_what_was_freed_goes_first():
    world = World(host_rows=0)
    own, other = world.serve(2), world.serve(2)
    world.record(own)
    world.record(other)
    spare = world.pool.device.spare
    world.serve(world.num_free + len(spare) * world.layout.slots_per_row)
    world.pool.prepare()
    world.allocator.free(other)
    world.serve(world.num_free)
    world.pool.prepare()
    # Two rows without a token, and two of tokens that are still there.
    world.serve(2 * world.layout.slots_per_row)
    world.pool.check_integrity()
    assert (world.pool.record_of_slot[own.numpy()] >= 0).all()


def test_a_prompt_gets_neighbouring_slots_while_there_are_any():
    world = World(host_rows=0)
    size = world.layout.slots_per_row
    slots = world.serve(7)
    rows = world.pool.record(slots, torch.arange(7))
    cells = world.pool.device.cells[rows].reshape(-1)
    assert (np.diff(cells) == 1).all()
    world.allocator.free(slots[[1, 2, 3, 5]])
    again = world.pool.record(slots[[1, 2, 3]], torch.arange(3))
    assert again.size == 3
    assert (np.diff(world.pool.device.cells[again].reshape(-1)) == 1).all()
    assert world.pool.device.cells.shape[1] == size


def test_a_token_recorded_into_a_page_leaves_the_rows_of_its_neighbours():
    """Chunks and decode steps write into pages whose first slots have rows of the same request."""
    world = World(page_size=4, host_rows=8)
    page = world.serve(1)
    first = world.record(page[:2])
    then = world.record(page[2:3])
    rows = as_recorded(world.pool.check_out("a", page[:3], 3))
    expected = [(stamp, float(slot)) for slot, stamp in (first | then).items()]
    assert world.read(rows) == expected
    again = world.record(page[1:2])
    assert world.pool.record_of_slot[page.numpy()].tolist()[3] == -1
    rows = as_recorded(world.pool.check_out("a", page[:3], 3))
    expected[1] = (again[int(page[1])], float(page[1]))
    assert world.read(rows) == expected


def test_a_cache_narrower_than_the_activations_holds_them_as_bytes():
    # float16 slots, float32 rows: a cell is two float32 in four float16.
    world = World(host_rows=4, kv_dtype=torch.float16)
    slots = world.serve(3)
    held = world.record(slots)
    world.pool.finish("a", slots, 3, 0.0)
    found = check_out(world, "a", slots)
    expected = [(stamp, float(slot)) for slot, stamp in held.items()]
    assert world.read(found) == expected
    assert world.pool.hedge(8) == 3
    out = world.pool.check_out("a", slots[:0], 3)
    on_host = as_recorded(out).without(torch.from_numpy(out.rows))
    assert world.read(on_host) == expected


def test_every_entry_of_the_table_happens_in_the_pool():
    """Serving, hedging, votes and flushes at random, until each has been seen; what is not listed never is."""
    draw = np.random.default_rng(0)
    seen = set()
    for turn in range(200):
        world = World(host_rows=6, eviction=("value", "lru")[turn % 2])
        pool = world.pool
        change = pool._change

        def watch(records, event, pool=pool, change=change):
            seen.update((RowState(s), event) for s in pool.state[records])
            change(records, event)

        pool._change = watch
        owned = []
        for now in range(60):
            action = draw.integers(7)
            if action == 0 and (slots := world.serve(int(draw.integers(1, 12)))) is not None:
                owned.append(slots)
                world.record(slots)
            elif action == 1 and owned:
                slots = owned[draw.integers(len(owned))]
                pool.finish(f"r{draw.integers(4)}", slots, slots.numel(), now)
            elif action == 2 and owned:
                world.allocator.free(owned.pop(draw.integers(len(owned))))
            elif action == 3:
                pool.forget(f"r{draw.integers(4)}", now)
            elif action == 4:
                pool.voted(f"r{draw.integers(4)}", now)
                pool.appraise(now)
            else:
                pool.hedge(int(draw.integers(1, 6)))
            pool.check_integrity()
        if seen == set(ROW):
            return
    pytest.fail(f"never seen: {set(ROW) - seen}")


@pytest.mark.parametrize("state", RowState)
@pytest.mark.parametrize("event", RowEvent)
def test_every_state_and_event_is_listed_or_cannot_happen(state, event):
    """Places and slots agree with what the states say of them."""
    on_device = {RowState.DEVICE, RowState.HEDGED}
    on_host = {RowState.HEDGED, RowState.HOSTED, RowState.DETACHED}
    possible = {
        RowEvent.RECORD: state is RowState.FREE,
        RowEvent.RECORD_HOST: state is RowState.FREE,
        RowEvent.HEDGE: state is RowState.DEVICE,
        RowEvent.RECLAIM: state in on_device,
        RowEvent.SLOT_FREED: state not in (RowState.FREE, RowState.DETACHED),
        RowEvent.SLOT_LOST: state not in (RowState.FREE, RowState.DETACHED),
        RowEvent.UNHEDGE: state in on_host,
        RowEvent.UNWANTED: state is not RowState.FREE,
    }
    after = ROW.get((state, event))
    assert (after is not None) == possible[event]
    if after is None:
        return
    if event is RowEvent.RECLAIM:
        assert after not in on_device
        assert (after in on_host) == (state in on_host)
    if event is RowEvent.UNHEDGE:
        assert after not in on_host
        assert (after in on_device) == (state in on_device)
    if event in (RowEvent.SLOT_FREED, RowEvent.SLOT_LOST):
        assert after not in on_device
        assert (after is RowState.DETACHED) == (event is RowEvent.SLOT_LOST and state in on_host)


NEXT = {
    "record": lambda world, slots: world.record(slots[:2]),
    "free": lambda world, slots: world.allocator.free(slots),
    "free_one": lambda world, slots: world.allocator.free(slots[-1:]),
    "flush": lambda world, slots: world.allocator.clear(),
    "hedge": lambda world, slots: world.pool.hedge(8),
    "finish": lambda world, slots: world.pool.finish("b", slots, 4, 2.0),
    "forget": lambda world, slots: world.pool.forget("a", 2.0),
    "appraise": lambda world, slots: world.pool.appraise(5.0),
    "serve_all": lambda world, slots: world.serve(world.allocator.available_size()),
    "num_held": lambda world, slots: world.pool.num_held("a", slots, 4),
    "check_out": lambda world, slots: world.pool.check_out("a", slots, 4).rows.tolist(),
    "stats": lambda world, slots: counts(world),
}


def counts(world: World) -> dict:
    times = ("reclaim_p99_us_per_1000", "hedge_bytes_per_s")
    return {k: v for k, v in world.pool.stats().items() if k not in times}


@pytest.mark.parametrize("num_taken", [1, 7, 13, 20])
@pytest.mark.parametrize("what", NEXT)
def test_what_was_ready_is_as_if_it_had_been_taken_row_by_row(what, num_taken):
    """Tokens 0 and 1 have a copy; one row has slots and no token. The loop has made them ready, or has not."""
    seen = []
    for is_ready in (False, True):
        world = World(host_rows=6)
        slots = world.serve(4)
        world.record(slots)
        world.pool.finish("a", slots, 4, 0.0)
        assert world.pool.hedge(2) == 2
        out = world.pool.check_out("a", slots, 4)
        world.pool.check_in(out.ticket)
        spare = world.serve(1)
        world.record(spare)
        world.allocator.free(spare)
        world.serve(world.num_free)
        if is_ready:
            world.pool.prepare()
        else:
            world.pool.appraise(0.0)
        taken = [world.serve(1) for _ in range(num_taken)]
        assert None not in taken
        # A reader is told at once.
        ended = (world.pool.gens[out.rows] != out.gens).tolist()
        result = NEXT[what](world, slots)
        world.pool.prepare()
        served = world.serve(2) is not None
        world.pool.check_integrity()
        held = as_recorded(world.pool.check_out("a", slots[:0], 4))
        left = world.allocator.available_size()
        told = (ended, str(result), served, left, counts(world), held.rows.tolist())
        seen.append((*told, world.read(held)))
    assert seen[0] == seen[1]
