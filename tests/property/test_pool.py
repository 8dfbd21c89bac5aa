"""The activation pool against a dict: slots → contents, over SGLang's own allocator, with readers that come and go,
votes, a host tier, and serving that takes its slots back at any moment.
"""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pool_support import SIZE, World, as_recorded

from alchemist.protocol.rows import ROW, RowEvent, RowState
from alchemist.trainer.rows import Recorded, RowsRevoked


class PoolMachine(RuleBasedStateMachine):
    """The model: `content[slot]` is what was last recorded for a slot that serving holds. A slot may have lost its row;
    a row may never hold anything else. `answers` remember what their tokens' rows held when they ended.
    """

    @initialize(
        page_size=st.sampled_from([1, 4]),
        host_rows=st.sampled_from([0, 2, 6]),
        eviction=st.sampled_from(["value", "lru"]),
        fraction=st.sampled_from([0.5, 1.0]),
    )
    def start(self, page_size, host_rows, eviction, fraction):
        self.world = World(page_size, host_rows=host_rows, eviction=eviction, fraction=fraction)
        self.pool, self.allocator = self.world.pool, self.world.allocator
        self.owned: list[torch.Tensor] = []
        self.content: dict[int, float] = {}
        self.answers: dict[str, list[tuple[int, float]]] = {}
        self.readers: list[tuple[Recorded, list, tuple]] = []
        self.orphans: list[tuple] = []
        """Tickets of a trainer that has died."""
        self.clock = 0.0

    @rule(count=st.integers(1, 12))
    def prefill(self, count):
        free = self.allocator.available_size()
        slots = self.world.serve(count)
        # A loan is never felt.
        assert (slots is None) == (count * self.world.page_size > free)
        if slots is not None:
            self.owned.append(slots)
            self.content.update(self.world.record(slots))

    @rule(data=st.data())
    def finish(self, data):
        if self.owned:
            slots = data.draw(st.sampled_from(range(len(self.owned))))
            slots = self.owned[slots]
            rid = f"r{len(self.answers)}"
            self.pool.finish(rid, slots, slots.numel() + 1, self.clock)
            self.answers[rid] = [(s, self.content.get(s, -1.0)) for s in slots.tolist()]

    @rule(data=st.data())
    def free(self, data):
        if self.owned:
            slots = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
            self.allocator.free(slots)
            for slot in slots.tolist():
                self.content.pop(slot, None)

    @rule(portion=st.integers(1, 5))
    def hedge(self, portion):
        self.pool.hedge(portion)

    @rule(seconds=st.floats(0.1, 1e4))
    def time_passes(self, seconds):
        self.clock += seconds
        self.pool.appraise(self.clock)

    @rule(data=st.data(), event=st.sampled_from(["voted", "consumed", "forget"]))
    def of_an_answer(self, data, event):
        if self.answers:
            rid = data.draw(st.sampled_from(sorted(self.answers)))
            if event == "consumed":
                self.pool.consumed(rid)
            else:
                getattr(self.pool, event)(rid, self.clock)

    @rule(data=st.data())
    def check_out(self, data):
        if not self.answers:
            return
        rid = data.draw(st.sampled_from(sorted(self.answers)))
        known = self.answers[rid]
        # The tree may know any prefix of it still, under the same slots.
        alive = [s for s, stamp in known if self.content.get(s) == stamp and stamp >= 0]
        prefix = [s for s, _ in known[: len(alive)]]
        prefix = prefix if prefix == alive else []
        out = self.pool.check_out(rid, torch.tensor(prefix, dtype=torch.int64), len(known) + 1)
        stamps = [known[i][1] for i in np.flatnonzero(out.rows >= 0)]
        assert -1.0 not in stamps
        self.readers.append((as_recorded(out), list(zip(stamps, out.slots, strict=False)), out))

    @rule(data=st.data())
    def read(self, data):
        """What a reader finds is what was recorded, or it is told."""
        if not self.readers:
            return
        found, _, out = self.readers[data.draw(st.integers(0, len(self.readers) - 1))]
        expected = {i: s for i, (s, _) in zip(np.flatnonzero(out.rows >= 0), _, strict=True)}
        for _ in range(3):
            try:
                values = self.world.read(found)
            except RowsRevoked as revoked:
                found = found.without(torch.tensor(revoked.rows))
                continue
            positions = torch.nonzero(found.rows >= 0).flatten().tolist()
            assert [v for v, _ in values] == [expected[i] for i in positions]
            return
        pytest.fail("rows were revoked again and again although nobody else is at work")

    @rule(data=st.data())
    def check_in(self, data):
        if self.readers:
            index = data.draw(st.integers(0, len(self.readers) - 1))
            self.pool.check_in(self.readers.pop(index)[2].ticket)

    @rule()
    def the_trainer_dies(self):
        """In the middle of whatever it does: it only reads. What it has checked out stays so for the time being."""
        self.orphans += [out.ticket for _, _, out in self.readers]
        self.readers.clear()

    @rule()
    def a_new_trainer_comes(self):
        """The scheduler checks in for the dead one."""
        for ticket in self.orphans:
            self.pool.check_in(ticket)
        self.orphans.clear()
        if not self.readers:
            assert not self.pool._refs.any()

    @rule()
    def flush(self):
        self.allocator.clear()
        self.owned.clear()
        self.content.clear()

    def teardown(self):
        """Recording fails, whatever is going on: rows end, readers are told, and serving has every slot."""
        self.pool.stop("the end of the test")
        self.pool.check_integrity()
        free = self.allocator.free_pages.tolist()
        owned = sum(slots.numel() for slots in self.owned)
        assert len(set(free)) == len(free)
        assert len(free) * self.world.page_size + owned == SIZE
        for found, *_ in self.readers:
            where = found.rows >= 0
            if where.any():
                with pytest.raises(RowsRevoked) as revoked:
                    self.world.view.check(found.rows[where], found.gens[where])
                assert len(revoked.value.rows) == int(where.sum())

    @invariant()
    def tables_agree(self):
        self.pool.check_integrity()

    @invariant()
    def serving_never_loses_a_slot(self):
        owned = sum(slots.numel() for slots in self.owned)
        assert self.allocator.available_size() + owned == SIZE

    @invariant()
    def serving_keeps_what_it_wrote(self):
        for slots in self.owned:
            for buffer in (*self.world.k, *self.world.v):
                assert torch.equal(buffer[slots][:, 0, 0], slots.float())


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
    world.pool.consumed("b")
    world.pool.appraise(61.0)
    world.record(c)
    assert (world.pool.record_of_slot[a.numpy()] >= 0).all()
    assert (world.pool.record_of_slot[b.numpy()] == -1).all()


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
