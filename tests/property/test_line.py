"""The line of rows against a list: rows come in order, those that fit, and nothing that has ended."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from alchemist.server.line import Line

NUM_ROWS = 200
some_rows = st.lists(st.integers(0, NUM_ROWS - 1), max_size=NUM_ROWS, unique=True)


class LineMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.gens = np.zeros(NUM_ROWS, np.int64)
        self.line = Line(self.gens, NUM_ROWS)
        self.model: list[int] = []

    @rule(rows=some_rows)
    def append(self, rows):
        self.line.append(np.array(rows, np.int64))
        self.model += [row for row in rows if row not in self.model]

    @rule(rows=some_rows)
    def reset(self, rows):
        self.line.reset(np.array(rows, np.int64))
        self.model = rows

    @rule(rows=some_rows)
    def end_rows(self, rows):
        self.gens[rows] += 1
        self.model = [row for row in self.model if row not in rows]

    @rule(count=st.integers(0, NUM_ROWS))
    def end_the_first(self, count):
        self.end_rows(self.model[:count])

    @rule(count=st.integers(-1, NUM_ROWS), fitting=some_rows)
    def peek(self, count, fitting):
        found = self.line.peek(count, lambda rows: np.isin(rows, fitting)).tolist()
        assert found == [row for row in self.model if row in fitting][: max(0, count)]

    @invariant()
    def memory_is_bounded(self):
        assert self.line._rows.size <= 4 * NUM_ROWS + 64


TestLine = LineMachine.TestCase
TestLine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
