"""Lends free KV slots to the activation pool and takes them back the instant serving needs them.

SGLang's allocator keeps a list of free pages. `borrow` takes pages from its end; `available_size` goes on counting
them, so admission, eviction and the leak check see what they would see without a loan. When an allocation needs more
pages than the list holds, pages come back from the pool first: bookkeeping only, never a copy.
On a GPU the list is the device's: which pages have been borrowed is known a moment later (see `arrivals.py`), and
until then they can be given back unseen.

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

from alchemist.protocol.streams import to_device
from alchemist.server.arrivals import Arrivals

MIN_RECLAIM_SLOTS = 1024
"""Taken back at a time, if that ends no row without a copy: a decode step needs one slot, the next one another."""
KEPT_FREE = 64
"""One slot in so many is not lent, so that not every decode step has to take slots back."""
NUM_TIMES = 4096
_CHUNK = 4096

Loan = tuple[np.ndarray, torch.Tensor]
"""Borrowed pages that come back: on the CPU, and as the allocator lists free ones."""


class Lender:
    """One allocator's loans.

    Attributes:
        num_lent: pages out on loan.
        reclaims: (slots, seconds) of the last `NUM_TIMES` times that serving took slots back.
    """

    def __init__(self, allocator: Any) -> None:
        self._allocator = allocator
        self.page_size: int = allocator.page_size
        self.num_lent = 0
        self._is_lent = np.zeros(allocator.size // self.page_size + 1, np.bool_)
        """By page."""
        self._reserve = torch.empty(0, dtype=torch.int64)
        """Room for every page's number, once there are loans."""
        self.num_reclaimed = 0
        """Slots taken back since the start."""
        self.reclaims: deque[tuple[int, float]] = deque(maxlen=NUM_TIMES)
        self._give_back: Callable[[int, int], Loan | None] = lambda need, more: None
        self._underway: dict[int, torch.Tensor] = {}
        """Loans whose pages are not known yet, by number."""
        self._num_loans = 0

    def install(
        self,
        arrivals: Arrivals,
        give_back: Callable[[int, int], Loan | None],
        on_free: Callable[[torch.Tensor], None],
        on_clear: Callable[[], None],
    ) -> None:
        """Wrap the allocator's methods.

        Args:
            arrivals: brings what is on the device.
            give_back: called with how many slots are needed and how many would be welcome; returns borrowed pages:
                as many as are needed, or all; None if there are none. May not wait.
            on_free: called with slots before they are freed.
            on_clear: called before all slots are freed, lent ones too.
        """
        allocator = self._allocator
        self._arrivals, self._give_back = arrivals, give_back
        # Zeroed, so that its memory is there when there is no other.
        self._reserve = torch.zeros_like(allocator.free_pages)
        free, free_segment, clear = allocator.free, allocator.free_segment, allocator.clear
        available_size = allocator.available_size
        alloc, alloc_extend, alloc_decode = (
            allocator.alloc,
            allocator.alloc_extend,
            allocator.alloc_decode,
        )
        page_size = self.page_size

        def counted_available_size() -> int:
            return int(available_size()) + self.num_lent * page_size

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
            free(free_index)

        def followed_free_segment(free_index: torch.Tensor, *, start_pos: int) -> None:
            # With pages of one slot it calls the function above.
            if page_size > 1 or not arrivals.is_deferred:
                on_free(free_index)
            free_segment(free_index, start_pos=start_pos)

        def followed_clear() -> None:
            on_clear()
            self._underway.clear()
            self._is_lent.fill(False)
            self.num_lent = 0
            clear()

        allocator.available_size = counted_available_size
        allocator.alloc = covered_alloc
        allocator.alloc_extend = covered_alloc_extend
        allocator.alloc_decode = covered_alloc_decode
        allocator.free = followed_free
        allocator.free_segment = followed_free_segment
        allocator.clear = followed_clear

    @property
    def num_underway(self) -> int:
        """Pages that were borrowed and are not known yet."""
        return sum(len(pages) for pages in self._underway.values())

    @property
    def num_lendable(self) -> int:
        """Pages that could be borrowed now."""
        allocator = self._allocator
        kept = int(allocator.size) // self.page_size // KEPT_FREE
        return max(0, len(allocator.free_pages) - kept)

    @property
    def has_plenty(self) -> bool:
        """Whether more could be borrowed than serving takes back at a time."""
        enough = min(2 * MIN_RECLAIM_SLOTS, int(self._allocator.size) // 16)
        return self.num_lendable * self.page_size > enough

    def borrow(self, num_slots: int, found: Callable[[np.ndarray], None]) -> None:
        """Take up to `num_slots` free slots, in whole pages, and call `found` with them once they are known: ascending,
        int64. Slot 0 is never among them. When there are none, or they are taken back before, it is not called.
        """
        allocator = self._allocator
        count = min(num_slots // self.page_size, self.num_lendable)
        if count <= 0:
            return
        pages = allocator.free_pages[-count:]
        allocator.free_pages = allocator.free_pages[:-count]
        self.num_lent += count
        number = self._num_loans = self._num_loans + 1
        self._underway[number] = pages
        self._arrivals.then((pages,), partial(self._arrived, number, found))

    def _arrived(
        self, number: int, found: Callable[[np.ndarray], None], pages: torch.Tensor
    ) -> None:
        if self._underway.pop(number, None) is None:
            return
        known = np.sort(pages.numpy())
        self._is_lent[known] = True
        found((known[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1))

    def loan(self, pages: np.ndarray) -> Loan:
        """Borrowed pages, ready to come back."""
        free_pages = self._allocator.free_pages
        return pages, to_device(pages, free_pages.device).to(free_pages.dtype)

    def give(self, loan: Loan) -> None:
        """Pages come back."""
        pages, listed = loan
        self._is_lent[pages] = False
        self._return(listed)

    def _return(self, listed: torch.Tensor) -> None:
        allocator = self._allocator
        allocator.free_pages = torch.cat((allocator.free_pages, listed))
        self.num_lent -= listed.numel()

    def give_all(self) -> None:
        """Every loan comes back, whoever had it: for once only, and without taking memory."""
        allocator = self._allocator
        count = len(allocator.free_pages)
        self._reserve[:count] = allocator.free_pages
        for start in range(0, self._is_lent.size, _CHUNK):
            (found,) = np.nonzero(self._is_lent[start : start + _CHUNK])
            self._reserve[count : count + found.size] = torch.from_numpy(found + start)
            count += found.size
        for pages in self._underway.values():
            self._reserve[count : count + len(pages)] = pages
            count += len(pages)
        allocator.free_pages = self._reserve[:count]
        self._is_lent.fill(False)
        self._underway.clear()
        self.num_lent = 0

    def _cover(self, num_pages: int) -> None:
        """See to it that the allocator's own list has `num_pages`, as far as there are loans."""
        allocator = self._allocator
        short = num_pages - allocator.free_pages.numel() - allocator.release_pages.numel()
        if short <= 0 or not self.num_lent:
            return
        started = time.perf_counter()
        while self._underway and short > 0:
            _, underway = self._underway.popitem()
            self._return(underway)
            short -= len(underway)
        if short <= 0:
            return
        loan = self._give_back(short * self.page_size, MIN_RECLAIM_SLOTS)
        if loan is None:
            return
        self.give(loan)
        seconds, num_slots = time.perf_counter() - started, loan[0].size * self.page_size
        self.num_reclaimed += num_slots
        self.reclaims.append((num_slots, seconds))
