"""Lends free KV slots to the activation pool and takes them back the instant serving needs them.

SGLang's allocator keeps a list of free pages and takes from its beginning. What is on loan is the list's end: it stays
in the list, so `available_size`, admission, eviction and the leak check see what they would see without a loan, and a
page comes back by being counted as one that is not lent. Before an allocation reaches the list's end, the pool is told
to end the rows that lie there: bookkeeping only, never a copy, nor any work on the list.

On a GPU the list is the device's: which pages have been borrowed is known a moment later (see `arrivals.py`), and
until then they can be given back unseen. The order of those that are known is kept on the CPU, too.

Everything is done on the allocator's instance, because subclasses override these methods freely.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

from alchemist.protocol.streams import to_device
from alchemist.server.arrivals import Arrivals
from alchemist.server.ids import Ids

MIN_RECLAIM_SLOTS = 1024
"""Taken back at a time, if that ends no row without a copy: a decode step needs one slot, the next one another."""
KEPT_FREE = 64
"""One slot in so many is not lent, so that not every decode step has to take slots back."""
NUM_TIMES = 4096


class Lender:
    """One allocator's loans.

    Attributes:
        num_lent: pages out on loan, the last ones of the allocator's list.
        reclaims: (slots, seconds) of the last `NUM_TIMES` times that serving took slots back.
    """

    def __init__(self, allocator: Any) -> None:
        self._allocator = allocator
        self.page_size: int = allocator.page_size
        self._appends = isinstance(allocator, TokenToKVPoolAllocator)
        """Whether what is freed is appended to the list. An allocator of pages has it first, of one slot each, too."""
        self.num_lent = 0
        num_pages = allocator.size // self.page_size + 1
        self._order, self._place = np.zeros((2, num_pages), np.int64)
        """Pages on loan, the list's last one first; and where each page is among them. Only of those that are known."""
        self._is_named = np.zeros(num_pages, bool)
        self.num_reclaimed = 0
        """Slots taken back since the start."""
        self.reclaims: deque[tuple[int, float]] = deque(maxlen=NUM_TIMES)
        self._give_back: Callable[[int, int], int] = lambda need, more: 0
        self._underway: dict[int, int] = {}
        """How many pages there are in each loan whose pages are not known yet, by number: the list's first lent ones,
        the latest loan before the others.
        """
        self._num_loans = 0

    def install(
        self,
        arrivals: Arrivals,
        give_back: Callable[[int, int], int],
        on_free: Callable[[torch.Tensor], None],
        on_clear: Callable[[], None],
        stay_last: Callable[[int], None],
    ) -> None:
        """Wrap the allocator's methods. None of what it is given may fail.

        Args:
            arrivals: brings what is on the device.
            give_back: called with how many slots are needed and how many would be welcome; ends what lies in the pages
                that come first in the list, as many as are needed, or all, and returns their number. May not wait.
            on_free: called with slots before they are freed.
            on_clear: called before all slots are freed, lent ones too.
            stay_last: our method of that name.
        """
        allocator = self._allocator
        self._arrivals, self._give_back = arrivals, give_back
        free, free_segment, clear = allocator.free, allocator.free_segment, allocator.clear
        alloc, alloc_extend, alloc_decode = (
            allocator.alloc,
            allocator.alloc_extend,
            allocator.alloc_decode,
        )
        page_size = self.page_size

        def covered_alloc(need_size: int) -> Any:
            self._cover(-(-need_size // page_size))
            return alloc(need_size)

        def covered_alloc_extend(
            prefix_lens: Any,
            prefix_lens_cpu: Any,
            seq_lens: Any,
            seq_lens_cpu: Any,
            last_loc: Any,
            extend_num_tokens: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            # As SGLang bounds it itself: the new tokens' pages and a part of one for each request.
            self._cover(extend_num_tokens // page_size + len(prefix_lens) + 1)
            return alloc_extend(
                prefix_lens,
                prefix_lens_cpu,
                seq_lens,
                seq_lens_cpu,
                last_loc,
                extend_num_tokens,
                *args,
                **kwargs,
            )

        def covered_alloc_decode(seq_lens: Any, *args: Any, **kwargs: Any) -> Any:
            self._cover(len(seq_lens))
            return alloc_decode(seq_lens, *args, **kwargs)

        def followed_free(free_index: torch.Tensor) -> None:
            # What is collected in a group comes here again when the group ends, at once: on a GPU once is enough.
            if allocator.is_not_in_free_group or not arrivals.is_deferred:
                on_free(free_index)
            num_before = allocator.free_pages.numel()
            free(free_index)
            stay_last(num_before)

        def followed_free_segment(free_index: torch.Tensor, *, start_pos: int) -> None:
            # With pages of one slot it calls the function above.
            if page_size > 1 or not arrivals.is_deferred:
                on_free(free_index)
            free_segment(free_index, start_pos=start_pos)

        def followed_clear() -> None:
            on_clear()
            self.give_all()
            clear()

        allocator.alloc = covered_alloc
        allocator.alloc_extend = covered_alloc_extend
        allocator.alloc_decode = covered_alloc_decode
        allocator.free = followed_free
        allocator.free_segment = followed_free_segment
        allocator.clear = followed_clear

    @property
    def num_underway(self) -> int:
        """Pages that were borrowed and are not known yet."""
        return sum(self._underway.values())

    @property
    def num_lendable(self) -> int:
        """Pages that could be borrowed now."""
        allocator = self._allocator
        if allocator.need_sort:
            # The list is sorted now and then, and would have no end that stays.
            return 0
        kept = int(allocator.size) // self.page_size // KEPT_FREE
        return max(0, int(allocator.free_pages.numel()) - self.num_lent - kept)

    @property
    def has_plenty(self) -> bool:
        """Whether more could be borrowed than serving takes back at a time."""
        enough = min(2 * MIN_RECLAIM_SLOTS, int(self._allocator.size) // 16)
        return self.num_lendable * self.page_size > enough

    def borrow(self, num_slots: int, at_once: int, found: Callable[[Ids], None]) -> None:
        """Take up to `num_slots` free slots, in whole pages and in multiples of `at_once` slots, and call `found` with
        them once they are known: ascending, int64. Slot 0 is never among them. When there are none, or they are taken
        back before, it is not called.
        """
        pages_at_once = at_once // self.page_size
        count = min(num_slots // self.page_size, self.num_lendable)
        count -= count % pages_at_once
        if count <= 0:
            return
        free = self._allocator.free_pages
        end = free.numel() - self.num_lent
        self.num_lent += count
        number = self._num_loans = self._num_loans + 1
        self._underway[number] = count
        self._arrivals.then((free[end - count : end],), partial(self._arrived, number, found))

    def _arrived(self, number: int, found: Callable[[Ids], None], pages: torch.Tensor) -> None:
        if number not in self._underway:
            return
        # Loans become known in their order, and the latest ones are first in the list.
        count = self._underway.pop(number)
        last = self.num_lent - self.num_underway
        places = np.arange(last - 1, last - count - 1, -1)
        known = pages.numpy().copy()
        self._order[places], self._place[known] = known, places
        known.sort()
        found((known[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1))

    def line_up(self, pages: Ids) -> None:
        """Of the borrowed pages that are known these are the first in the list from now on, in this order."""
        first = self.num_lent - self.num_underway
        wanted = np.arange(first - 1, first - pages.size - 1, -1)
        there, places = self._order[wanted], self._place[pages]
        self._is_named[pages] = True
        moved = there[~self._is_named[there]]
        self._is_named[pages] = False
        left = places[places < first - pages.size]
        self._order[left], self._place[moved] = moved, left
        self._order[wanted], self._place[pages] = pages, wanted
        changed = np.concatenate((wanted, left))
        free = self._allocator.free_pages
        # Nobody has been given a part of the list's end: it may be changed in place.
        at, new = (
            to_device(ids, free.device)
            for ids in (free.numel() - 1 - changed, self._order[changed])
        )
        free.index_copy_(0, at, new.to(free.dtype))

    def give_all(self) -> None:
        """Every loan comes back, whoever had it."""
        self._underway.clear()
        self.num_lent = 0

    def check_integrity(self, lent: Ids) -> None:
        """AssertionError unless `lent` is what is on loan, and lies where it should."""
        assert not self._underway, "a loan that is not known"
        assert lent.size == self.num_lent, "the number of pages on loan"
        order = self._order[: self.num_lent]
        free = self._allocator.free_pages.cpu().numpy()
        assert (free[free.size - self.num_lent :][::-1] == order).all(), "the end of the list"
        assert (self._place[order] == np.arange(self.num_lent)).all(), "places"
        assert set(order) == set(lent), "the pages on loan"

    def stay_last(self, num_before: int) -> None:
        """The list had `num_before` pages. What was freed goes before the lent ones."""
        free = self._allocator.free_pages
        if self._appends and self.num_lent and free.numel() > num_before:
            kept = num_before - self.num_lent
            parts = (free[:kept], free[num_before:], free[kept:num_before])
            self._allocator.free_pages = torch.cat(parts)

    def _cover(self, num_pages: int) -> None:
        """See to it that `num_pages` pages at the list's beginning are not lent, as far as there are so many."""
        if not self.num_lent:
            return
        started = time.perf_counter()
        short = num_pages - self._allocator.free_pages.numel() + self.num_lent
        if short <= 0:
            return
        while self._underway and short > 0:
            _, count = self._underway.popitem()
            self.num_lent -= count
            short -= count
        if short <= 0:
            return
        count = self._give_back(short * self.page_size, MIN_RECLAIM_SLOTS)
        if not count:
            return
        self.num_lent -= count
        num_slots = count * self.page_size
        self.num_reclaimed += num_slots
        self.reclaims.append((num_slots, time.perf_counter() - started))
