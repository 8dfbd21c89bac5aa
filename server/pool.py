"""The activation pool: rows of activations, found by KV slot.

`row_of_slot[slot]` names the row that holds the activations of the token whose keys and values are in `slot` (−1:
none). Whoever holds a slot therefore holds its row: a radix prefix hit reuses rows as it reuses slots, and a completion
that shares a recorded system prompt shares its rows. A row ends when its slot is freed, when its slot is written again,
or when rows run short and it is the least recently used one that nobody has checked out.

`row_gen[row]` lies in shared memory and is raised the moment a row stops being what it was, before anything new is
written into it: a reader in another process compares it after reading and so never uses a torn row. `check_out` raises
the row's reference count, which keeps it from being taken for another token; it cannot keep the slot (serving's need
for KV comes first), so a reader must still look at the generation.

One thread, the scheduler's, calls everything here.
"""

from __future__ import annotations

import torch

from alchemist.protocol.layout import RowLayout
from alchemist.protocol.shm import TensorHandle
from alchemist.protocol.tensors import Arena


class ActivationPool:
    """`num_rows` rows of `layout` in shared memory, and the tables that find them.

    Attributes:
        data: per layer [num_rows, layout.width] of the serving dtype.
        row_gen: [num_rows] int64, shared.
        row_of_slot: [num_slots] int64.
    """

    def __init__(
        self, layout: RowLayout, num_rows: int, num_slots: int, page_size: int = 1
    ) -> None:
        """Args:
        num_slots: size of the KV pool's first dimension (dummy slot and page padding included).
        page_size: freeing any slot of a page frees the page.
        """
        self.layout = layout
        self.num_rows = num_rows
        self.page_size = page_size
        dtype = getattr(torch, layout.dtype)
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            str(layer): ((num_rows, layout.width), dtype) for layer in range(layout.num_layers)
        }
        specs["row_gen"] = ((num_rows,), torch.int64)
        self._arena = Arena("rows", specs, populate=True)
        self.data = [self._arena.tensors[str(layer)] for layer in range(layout.num_layers)]
        self.row_gen = self._arena.tensors["row_gen"]
        self.row_of_slot = torch.full((num_slots,), -1, dtype=torch.int64)
        self._slot_of_row = torch.full((num_rows,), -1, dtype=torch.int64)
        self._refs = torch.zeros(num_rows, dtype=torch.int64)
        self._last_used = torch.zeros(num_rows, dtype=torch.int64)
        self._free = torch.arange(num_rows, dtype=torch.int64)
        self._tick = 0
        self.num_lost = 0
        """Tokens that were to be recorded and found no row."""

    @property
    def handles(self) -> tuple[list[TensorHandle], TensorHandle]:
        """Handles of the row tensors, one a layer, and of `row_gen`."""
        handles = self._arena.handles
        return [handles[str(layer)] for layer in range(self.layout.num_layers)], handles["row_gen"]

    @property
    def num_free(self) -> int:
        return self._free.numel()

    def alloc(self, slots: torch.Tensor) -> torch.Tensor | None:
        """Take one row for each slot; whatever rows the slots had end.

        Args:
            slots: [n] int64, distinct, without the dummy slot 0.

        Returns:
            [n] int64 rows, or None when there are not enough: all or nothing.
        """
        self.free_slots(slots)
        count = slots.numel()
        if count > self._free.numel():
            self._evict(count - self._free.numel())
        if count > self._free.numel():
            self.num_lost += count
            return None
        rows = self._take(count)
        self._tick += 1
        self.row_of_slot[slots] = rows
        self._slot_of_row[rows] = slots
        self._last_used[rows] = self._tick
        return rows

    def free_slots(self, slots: torch.Tensor) -> None:
        """The KV slots were freed: their rows end. Slots without a row are fine."""
        if self.page_size > 1:
            pages = torch.unique(slots // self.page_size)
            slots = (pages[:, None] * self.page_size + torch.arange(self.page_size)).flatten()
        rows = self.row_of_slot[slots]
        rows = rows[rows >= 0]
        if rows.numel():
            self._end(rows)

    def clear(self) -> None:
        """The KV pool was flushed: every row ends."""
        held = torch.nonzero(self._slot_of_row >= 0).flatten()
        if held.numel():
            self._end(held)

    def lookup(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of the slots, −1 where there is none; counts as a use."""
        rows = self.row_of_slot[slots]
        self._tick += 1
        self._last_used[rows[rows >= 0]] = self._tick
        return rows

    def check_out(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the slots for a reader, and their generations (0 where the row is −1)."""
        rows = self.lookup(slots)
        held = rows[rows >= 0]
        self._refs.index_add_(0, held, torch.ones_like(held))
        return rows, torch.where(rows >= 0, self.row_gen[rows.clamp(min=0)], 0)

    def check_in(self, rows: torch.Tensor, gens: torch.Tensor) -> None:
        """The reader is done with what `check_out` gave it. Rows that ended meanwhile have no count left to lower."""
        same = (rows >= 0) & (self.row_gen[rows.clamp(min=0)] == gens)
        held = rows[same]
        self._refs.index_add_(0, held, torch.full_like(held, -1))

    def check_integrity(self) -> None:
        """Recompute every derived set from scratch; AssertionError names what does not agree."""
        held = torch.nonzero(self._slot_of_row >= 0).flatten()
        assert torch.equal(self.row_of_slot[self._slot_of_row[held]], held), "row ↔ slot"
        assert int((self.row_of_slot >= 0).sum()) == held.numel(), (
            "a slot names a row that is not its own"
        )
        both = torch.cat((held, self._free)).sort().values
        assert torch.equal(both, torch.arange(self.num_rows)), "free + held = all"
        assert int(self._refs.min()) >= 0, "negative count"
        assert not self._refs[self._free].any(), "a free row has readers"

    def _take(self, count: int) -> torch.Tensor:
        """`count` of the free rows: neighbours, if so many are, because one plain copy into them is several times
        faster than a scatter. Rows come back in the order of eviction, so free neighbours drift apart in the list.
        """
        first = 0
        if not bool((self._free[:count].diff() == 1).all()):
            self._free = self._free.sort().values
            spans = self._free[count - 1 :] - self._free[: self._free.numel() - count + 1]
            runs = torch.nonzero(spans == count - 1)
            first = int(runs[0]) if runs.numel() else 0
        rows = self._free[first : first + count]
        self._free = torch.cat((self._free[:first], self._free[first + count :]))
        return rows

    def _end(self, rows: torch.Tensor) -> None:
        # The generation first: a reader that sees new content also sees the new generation.
        self.row_gen[rows] += 1
        self.row_of_slot[self._slot_of_row[rows]] = -1
        self._slot_of_row[rows] = -1
        self._refs[rows] = 0
        self._free = torch.cat((self._free, rows.sort().values))

    def _evict(self, count: int) -> None:
        """End at least `count` rows, the least recently used first, if so many are held without a reader."""
        candidates = torch.nonzero((self._slot_of_row >= 0) & (self._refs == 0)).flatten()
        # A few more than asked for, so that the search is not repeated for every request.
        count = min(candidates.numel(), max(count, self.num_rows // 16))
        if count:
            oldest = torch.topk(
                self._last_used[candidates], count, largest=False, sorted=False
            ).indices
            self._end(candidates[oldest])
