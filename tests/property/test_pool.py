"""The activation pool against a dict: slots → contents, with readers that come and go."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from alchemist.protocol.layout import RowLayout
from alchemist.server.pool import ActivationPool

SLOTS, ROWS = 24, 9
LAYOUT = RowLayout(
    num_layers=2,
    hidden_size=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    intermediate_size=1,
    has_qk_norm=False,
    dtype="float32",
)
slots = st.lists(st.integers(1, SLOTS - 1), min_size=1, max_size=12, unique=True)


class PoolMachine(RuleBasedStateMachine):
    """The model: `content[slot]` is what was last written for the slot, as long as the pool claims to have it."""

    @initialize(page_size=st.sampled_from([1, 4]))
    def start(self, page_size):
        self.pool = ActivationPool(LAYOUT, ROWS, SLOTS, page_size)
        self.page_size = page_size
        self.content: dict[int, float] = {}
        self.readers: list[tuple[torch.Tensor, torch.Tensor, list[float]]] = []
        self.stamp = 0.0

    @rule(which=slots)
    def write(self, which):
        if self.page_size > 1:
            # The allocator hands out whole pages; writing part of one again is not something it does.
            which = [s for s in which if s not in self.content]
            which = [s for s in which if not any(o // 4 == s // 4 for o in self.content)]
        if not which:
            return
        rows = self.pool.alloc(torch.tensor(which))
        for slot in which:
            self.content.pop(slot, None)
        if rows is None:
            held = sum(int((rows_ >= 0).sum()) for rows_, _, _ in self.readers)
            assert len(which) > ROWS - held or len(which) > ROWS
            return
        assert rows.unique().numel() == len(which)
        self.stamp += 1
        for layer in self.pool.data:
            layer[rows] = self.stamp
        self.content.update(dict.fromkeys(which, self.stamp))

    @rule(which=slots)
    def free(self, which):
        self.pool.free_slots(torch.tensor(which))
        pages = {slot // self.page_size for slot in which}
        for slot in [s for s in self.content if s // self.page_size in pages]:
            del self.content[slot]

    @rule()
    def flush(self):
        self.pool.clear()
        self.content.clear()

    @rule(which=slots)
    def check_out(self, which):
        rows, gens = self.pool.check_out(torch.tensor(which))
        values = [self.content.get(slot, -1.0) for slot in which]
        self.readers.append((rows, gens, values))

    @rule(data=st.data())
    def check_in(self, data):
        if self.readers:
            index = data.draw(st.integers(0, len(self.readers) - 1))
            rows, gens, _ = self.readers.pop(index)
            self.pool.check_in(rows, gens)

    @rule()
    def reader_dies(self):
        # What a dead trainer held is checked in by its successor's first question.
        for rows, gens, _ in self.readers:
            self.pool.check_in(rows, gens)
        self.readers.clear()

    @invariant()
    def tables_agree(self):
        self.pool.check_integrity()

    @invariant()
    def every_row_holds_what_its_slot_was_given(self):
        for slot in range(SLOTS):
            row = int(self.pool.row_of_slot[slot])
            if row >= 0:
                assert self.pool.data[1][row, 0].item() == self.content[slot]

    @invariant()
    def a_reader_with_unchanged_generations_reads_what_it_was_promised(self):
        for rows, gens, values in self.readers:
            for row, gen, value in zip(rows.tolist(), gens.tolist(), values, strict=True):
                if row >= 0 and self.pool.row_gen[row].item() == gen:
                    assert self.pool.data[0][row, 0].item() == value


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_rows_that_are_read_are_not_taken_for_others():
    pool = ActivationPool(LAYOUT, 4, SLOTS)
    pool.alloc(torch.tensor([1, 2]))
    rows, gens = pool.check_out(torch.tensor([1, 2]))
    assert pool.alloc(torch.tensor([3, 4])) is not None
    # Two rows are being read: of four, only two can be had.
    assert pool.alloc(torch.tensor([5, 6, 7])) is None
    assert pool.num_lost == 3
    assert torch.equal(pool.row_gen[rows], gens)
    pool.check_in(rows, gens)
    assert pool.alloc(torch.tensor([5, 6, 7])) is not None
    assert not torch.equal(pool.row_gen[rows], gens)


def test_the_least_recently_used_rows_go_first():
    pool = ActivationPool(LAYOUT, 4, SLOTS)
    pool.alloc(torch.tensor([1, 2]))
    pool.alloc(torch.tensor([3, 4]))
    pool.lookup(torch.tensor([1, 2]))
    pool.alloc(torch.tensor([5, 6]))
    assert (pool.row_of_slot[torch.tensor([1, 2])] >= 0).all()
    assert (pool.row_of_slot[torch.tensor([3, 4])] == -1).all()


def test_a_prompt_gets_neighbouring_rows_while_there_are_any():
    pool = ActivationPool(LAYOUT, num_rows=12, num_slots=64)
    slots = torch.arange(1, 13)
    assert pool.alloc(slots).tolist() == list(range(12))
    # Freed in another order, as eviction does, with rows 4 and 9 still held.
    for gone in ([8, 7, 6], [11, 12, 9], [2, 1, 4, 3]):
        pool.free_slots(torch.tensor(gone))
    assert pool.alloc(torch.arange(20, 24)).tolist() == [5, 6, 7, 8]
    assert pool.alloc(torch.arange(30, 33)).tolist() == [0, 1, 2]
    assert pool.alloc(torch.arange(40, 43)).tolist() == [3, 10, 11]
    pool.check_integrity()
