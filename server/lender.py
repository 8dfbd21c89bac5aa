"""Lends free KV slots to the activation pool and takes them back the instant serving needs them.

SGLang's allocator keeps a list of free pages. `borrow` takes pages from its end; `available_size` goes on counting
them, so admission, eviction and the leak check see what they would see without a loan. When an allocation needs more
pages than the list holds, pages come back from the pool first: bookkeeping only, never a copy.

Everything is done on the allocator's instance, because subclasses override these methods freely.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

MIN_RECLAIM_SLOTS = 1024
"""Taken back at a time, if that ends no row without a copy: a decode step needs one slot, the next one another."""
KEPT_FREE = 64
"""One slot in so many is not lent, so that not every decode step has to take slots back."""
NUM_TIMES = 4096
_CHUNK = 4096


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
        self._give_back: Callable[[int, int], np.ndarray] = lambda need, more: np.empty(0, np.int64)

    def install(
        self,
        give_back: Callable[[int, int], np.ndarray],
        on_free: Callable[[torch.Tensor], None],
        on_clear: Callable[[], None],
    ) -> None:
        """Wrap the allocator's methods.

        Args:
            give_back: called with how many slots are needed and how many would be welcome; returns borrowed ones,
                in whole pages: as many as are needed, or all. May not wait.
            on_free: called with slots before they are freed.
            on_clear: called before all slots are freed, lent ones too.
        """
        allocator = self._allocator
        self._give_back = give_back
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
            on_free(free_index)
            free(free_index)

        def followed_free_segment(free_index: torch.Tensor, *, start_pos: int) -> None:
            on_free(free_index)
            free_segment(free_index, start_pos=start_pos)

        def followed_clear() -> None:
            on_clear()
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

    def borrow(self, num_slots: int) -> np.ndarray:
        """Up to `num_slots` free slots, in whole pages, ascending: int64, perhaps none. Slot 0 is never among them."""
        allocator = self._allocator
        free = len(allocator.free_pages) - allocator.size // self.page_size // KEPT_FREE
        count = min(num_slots // self.page_size, free)
        if count <= 0:
            return np.empty(0, np.int64)
        pages = np.sort(allocator.free_pages[-count:].numpy())
        self._is_lent[pages] = True
        allocator.free_pages = allocator.free_pages[:-count]
        self.num_lent += count
        slots: np.ndarray = pages[:, None] * self.page_size + np.arange(self.page_size)
        return slots.reshape(-1)

    def give(self, slots: np.ndarray) -> None:
        """Slots come back, in whole pages."""
        pages = slots[:: self.page_size] // self.page_size
        allocator = self._allocator
        free = torch.from_numpy(pages).to(allocator.free_pages.dtype)
        allocator.free_pages = torch.cat((allocator.free_pages, free))
        self._is_lent[pages] = False
        self.num_lent -= pages.size

    def give_all(self) -> None:
        """Every loan comes back, whoever had it: for once only, and without taking memory."""
        allocator = self._allocator
        count = len(allocator.free_pages)
        self._reserve[:count] = allocator.free_pages
        for start in range(0, self._is_lent.size, _CHUNK):
            (found,) = np.nonzero(self._is_lent[start : start + _CHUNK])
            self._reserve[count : count + found.size] = torch.from_numpy(found + start)
            count += found.size
        allocator.free_pages = self._reserve[:count]
        self._is_lent.fill(False)
        self.num_lent = 0

    def _cover(self, num_pages: int) -> None:
        """See to it that the allocator's own list has `num_pages`, as far as there are loans."""
        allocator = self._allocator
        short = num_pages - len(allocator.free_pages) - len(allocator.release_pages)
        if short <= 0 or not self.num_lent:
            return
        started = time.perf_counter()
        slots = self._give_back(short * self.page_size, MIN_RECLAIM_SLOTS)
        if not slots.size:
            return
        self.give(slots)
        self.num_reclaimed += slots.size
        self.reclaims.append((int(slots.size), time.perf_counter() - started))
