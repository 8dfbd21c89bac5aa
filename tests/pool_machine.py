"""The activation pool against a dict: slots → contents, over SGLang's own allocator, with readers that come and go,
votes, a host tier, and serving that takes its slots back at any moment. As on the CPU, and as on a GPU, where what
depends on slots is done later.
"""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pool_support import SIZE, World, as_recorded

from alchemist.trainer.rows import Recorded, RowsRevoked


class PoolMachine(RuleBasedStateMachine):
    """The model: `content[slot]` is what was last recorded for a slot that serving holds. A slot may have lost its row;
    a row may never hold anything else. `answers` remember what their tokens' rows held when they ended.
    """

    device = "cpu"

    @initialize(
        page_size=st.sampled_from([1, 4]),
        host_rows=st.sampled_from([0, 2, 6]),
        eviction=st.sampled_from(["value", "lru"]),
        fraction=st.sampled_from([0.5, 1.0]),
        is_deferred=st.booleans(),
    )
    def start(self, page_size, host_rows, eviction, fraction, is_deferred):
        self.world = World(
            page_size,
            host_rows=host_rows,
            eviction=eviction,
            fraction=fraction,
            is_deferred=is_deferred or None,
            device=self.device,
        )
        self.pool, self.allocator = self.world.pool, self.world.allocator
        self.owned: list[torch.Tensor] = []
        self.content: dict[int, float] = {}
        self.answers: dict[str, list[tuple[int, float]]] = {}
        self.readers: list[tuple[Recorded, list, tuple]] = []
        self.orphans: list[tuple] = []
        """Tickets of a trainer that has died."""
        self.clock = 0.0

    @rule(count=st.integers(1, 12), evicts=st.booleans(), data=st.data())
    def prefill(self, count, evicts, data):
        # Once a loop.
        self.pool.settle()
        self.pool.prepare()
        if evicts:
            self.free(data)
        free = self.allocator.available_size()
        slots = self.world.serve(count)
        # A loan is never felt.
        assert (slots is None) == (count * self.world.page_size > free)
        if slots is not None:
            self.owned.append(slots)
            self.content.update(self.world.record(slots))

    @rule(
        sizes=st.lists(st.sampled_from([1, 1, 1, 4, 9]), min_size=1, max_size=8),
        is_recorded=st.booleans(),
        goes_on=st.booleans(),
    )
    def record_later(self, sizes, is_recorded, goes_on):
        """Passes whose tokens' rows are begun together in the end, if they are recorded; the loop goes on between them,
        or does not.
        """
        self.pool.settle()
        self.pool.prepare()
        steps = []
        for size in sizes:
            slots = self.world.serve(size)
            if slots is None:
                break
            self.owned.append(slots)
            if is_recorded and not self.pool.arrivals.is_deferred:
                positions = torch.arange(slots.numel())
                steps.append((slots, self.pool.record_later(slots, positions)))
            if goes_on:
                self.pool.prepare()
        self.pool.begin_waiting()
        for slots, begun in steps:
            assert self.pool.still(begun.rows, begun.gens).all()
            self.content.update(self.world.fill(begun.rows, slots))

    @rule(size=st.integers(1, 9), goes_on=st.booleans())
    def end_before_rows_begin(self, size, goes_on):
        """As of a request that is aborted, or whose prefix another one has put into the tree meanwhile."""
        slots = None if self.pool.arrivals.is_deferred else self.world.serve(size)
        if slots is None:
            return
        begun = self.pool.record_later(slots, torch.arange(slots.numel()))
        if goes_on:
            self.pool.prepare()
        self.allocator.free(slots)
        self.pool.begin_waiting()
        assert not self.pool.still(begun.rows, begun.gens).any()

    @rule(data=st.data())
    def finish(self, data):
        if self.owned:
            slots = data.draw(st.sampled_from(range(len(self.owned))))
            slots = self.owned[slots]
            rid = f"r{len(self.answers)}"
            length, now = slots.numel() + 1, self.clock
            self.pool.arrivals.then(
                (slots,), lambda known: self.pool.finish(rid, known, length, now)
            )
            self.answers[rid] = [(s, self.content.get(s, -1.0)) for s in slots.tolist()]

    @rule(data=st.data())
    def freed(self, data):
        self.free(data)

    def free(self, data):
        if self.owned:
            slots = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
            self.allocator.free(slots)
            for slot in slots.tolist():
                self.content.pop(slot, None)

    @rule(portion=st.integers(1, 5))
    def hedge(self, portion):
        self.pool.hedge(portion)

    @rule(wait=st.booleans())
    def settle(self, wait):
        self.pool.settle(wait=wait)

    @rule()
    def prepare(self):
        self.pool.prepare()

    @rule(seconds=st.floats(0.1, 1e4))
    def time_passes(self, seconds):
        self.clock += seconds
        self.pool.appraise(self.clock)

    @rule(data=st.data(), event=st.sampled_from(["voted", "consumed", "forget"]))
    def of_an_answer(self, data, event):
        if self.answers:
            rid = data.draw(st.sampled_from(sorted(self.answers)))
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
        # The row desk answers when everything before the question is settled.
        self.pool.settle(wait=True)
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
        # What was under way comes too late, and harms nobody.
        self.pool.settle(wait=True)
        self.pool.check_integrity()

    @invariant()
    def tables_agree(self):
        if self.pool.is_settled:
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
