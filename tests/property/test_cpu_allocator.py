"""SGLang's paged allocator without Triton: every token gets a slot of its own, at its place in one of its pages."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from alchemist.server.cpu_allocator import CpuPagedAllocator

SIZE = 64


class AllocatorMachine(RuleBasedStateMachine):
    """The model: `requests` are the slots of each request's tokens, by position."""

    @initialize(page_size=st.sampled_from([2, 4, 16]), need_sort=st.booleans())
    def start(self, page_size, need_sort):
        self.page_size = page_size
        self.allocator = CpuPagedAllocator(
            SIZE, page_size, torch.float32, "cpu", kvcache=None, need_sort=need_sort
        )
        self.requests: list[list[int]] = []

    def pages_of(self, length):
        return -(-length // self.page_size)

    def free_pages(self):
        used = sum(self.pages_of(len(slots)) for slots in self.requests)
        return SIZE // self.page_size - used

    @rule(data=st.data(), lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3))
    def extend(self, data, lengths):
        """New requests and chunks of old ones in one batch, as a prefill has them."""
        old = list(range(len(self.requests)))
        chosen = data.draw(st.lists(st.sampled_from(old), unique=True, max_size=2)) if old else []
        batch = [self.requests[i] for i in chosen][: len(lengths)]
        batch += [[] for _ in range(len(lengths) - len(batch))]
        before = torch.tensor([len(slots) for slots in batch])
        after = before + torch.tensor(lengths)
        last = torch.tensor([slots[-1] if slots else -1 for slots in batch])
        need = sum(
            self.pages_of(a) - self.pages_of(b)
            for a, b in zip(after.tolist(), before.tolist(), strict=True)
        )
        fits = need <= self.free_pages()
        out = self.allocator.alloc_extend(before, before, after, after, last, sum(lengths))
        assert (out is not None) == fits
        if out is None:
            return
        for slots, part in zip(batch, out.split(lengths), strict=True):
            if not slots:
                self.requests.append(slots)
            slots += part.tolist()

    @rule()
    def decode(self):
        if not self.requests:
            return
        lengths = torch.tensor([len(slots) + 1 for slots in self.requests])
        last = torch.tensor([slots[-1] for slots in self.requests])
        need = sum(len(slots) % self.page_size == 0 for slots in self.requests)
        fits = need <= self.free_pages()
        out = self.allocator.alloc_decode(lengths, lengths, last)
        assert (out is not None) == fits
        for slots, slot in zip(self.requests, [] if out is None else out.tolist(), strict=False):
            slots.append(slot)

    @rule(data=st.data())
    def free(self, data):
        if self.requests:
            slots = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
            self.allocator.free(torch.tensor(slots))

    @invariant()
    def nobody_has_anothers_slot(self):
        every = [slot for slots in self.requests for slot in slots]
        assert len(set(every)) == len(every)
        assert all(self.page_size <= slot < SIZE + self.page_size for slot in every)
        assert self.allocator.available_size() == self.free_pages() * self.page_size

    @invariant()
    def a_page_holds_neighbours_of_one_request(self):
        for slots in self.requests:
            for position, slot in enumerate(slots):
                assert slot % self.page_size == position % self.page_size
                if position % self.page_size:
                    assert slot == slots[position - 1] + 1


AllocatorMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestAllocator = AllocatorMachine.TestCase


@pytest.mark.parametrize("page_size", [1, 4])
def test_it_gives_no_more_than_there_is(page_size):
    allocator = CpuPagedAllocator(8, page_size, torch.float32, "cpu", kvcache=None, need_sort=False)
    assert allocator.alloc(8).tolist() == list(range(page_size, 8 + page_size))
    assert allocator.alloc(page_size) is None
    lengths = torch.tensor([9])
    assert allocator.alloc_decode(lengths, lengths, torch.tensor([8 + page_size - 1])) is None
