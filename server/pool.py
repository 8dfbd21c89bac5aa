"""The activation pool: recorded rows of prompt tokens, in KV slots that serving does not use and on the host.

A row belongs to one token and is found by the token's own KV slot: whoever holds a slot holds its row, so a radix
prefix hit reuses rows as it reuses slots, and completions that share a recorded system prompt share its rows. When the
token leaves the KV cache, its row lives on only on the host, for completions that may still be voted on. What can
happen to a row is `protocol.rows.ROW`, and every change here goes through that table.

The device tier borrows free KV slots (`lender.py`) and gives them back the instant serving allocates, in this order:
borrowed slots without a row; rows that have a copy on the host, least valuable first; rows without one; rows that the
trainer is reading. Nothing waits for a copy, nor for a search: the next ones are chosen once a loop. `hedge` makes the
copies, in small portions, when nobody waits.
A cache that has been busy for a while has no free slots, because old prefixes fill it; they are serving's, too, and are
not evicted for rows: what finds no slot is recorded on the host at once.

A row number, here and in the trainer, names a place: below `num_device_rows` one on the device, from there on one on
the host.

`gens` lies in shared memory, a number for every place on the device and on the host. It is raised the moment a place
stops being what it was, before anything new is written there: a reader in another process compares it after reading,
and so never uses a torn row.

One thread, the scheduler's, calls everything here. Bookkeeping is numpy's: a few microseconds a call. On a GPU the
slots of tokens are known a moment later than their rows (`arrivals.py`): what depends on them is done by `settle`, in
the order in which it was asked for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch

from alchemist.kernels import fp8_rows
from alchemist.protocol.layout import RowLayout
from alchemist.protocol.rows import ROW, RowEvent, RowState
from alchemist.protocol.shm import TensorHandle
from alchemist.protocol.tensors import Arena
from alchemist.server.answers import Answers
from alchemist.server.appraisal import Text
from alchemist.server.arrivals import Arrivals
from alchemist.server.gpu_tier import MAX_COPIES, GpuTier
from alchemist.server.ids import Ids, IdStack
from alchemist.server.lender import Lender
from alchemist.server.line import Line, Ready
from alchemist.server.tiers import DeviceTier, HostTier

P = ParamSpec("P")
T = TypeVar("T")
READY_SLOTS = 4096
"""That serving may want at a time without a search for them; more than a prefill has."""
STOCK = 16384
"""Rows with borrowed slots to be kept in hand on a GPU, where borrowing takes a moment: a large prefill's."""

_ON_DEVICE = np.array([s in (RowState.DEVICE, RowState.HEDGED) for s in RowState])
_ON_HOST = np.array([s in (RowState.HEDGED, RowState.HOSTED, RowState.DETACHED) for s in RowState])


def _next_states(event: RowEvent) -> np.ndarray:
    return np.array([ROW.get((state, event), -1) for state in RowState], dtype=np.int8)


_NEXT = {event: _next_states(event) for event in RowEvent}


def caught_up(
    method: Callable[Concatenate[ActivationPool, P], T],
) -> Callable[Concatenate[ActivationPool, P], T]:
    """A method of the pool before which its tables are brought up to date: see `_catch_up`."""

    @wraps(method)
    def wrapped(pool: ActivationPool, /, *args: P.args, **kwargs: P.kwargs) -> T:
        pool._catch_up()
        pool.begin_waiting()
        return method(pool, *args, **kwargs)

    return wrapped


class CheckedOut(NamedTuple):
    """Where a prompt's tokens are, by position; row −1: nowhere."""

    slots: Ids
    rows: Ids
    gens: Ids
    hedge_rows: Ids
    hedge_gens: Ids
    ticket: tuple[Ids, Ids]
    """For `check_in`."""


_NOBODY: Ids = np.empty(0, np.int64)


class Begun:
    """Rows of the first of some tokens, and their generations; none as long as the tokens wait."""

    def __init__(self, rows: Ids = _NOBODY, gens: Ids = _NOBODY) -> None:
        self.rows, self.gens = rows, gens


class ActivationPool:
    """Rows of one model's tokens.

    Attributes:
        gens: [device rows + host rows] int64, shared.
        record_of_slot: [num_slots] the record of the token in each KV slot, −1: none.
    """

    def __init__(
        self,
        layout: RowLayout,
        k: Sequence[torch.Tensor],
        v: Sequence[torch.Tensor],
        lender: Lender,
        *,
        num_device_rows: int,
        num_host_rows: int,
        eviction: str = "value",
        is_deferred: bool | None = None,
    ) -> None:
        """Args:
        k, v: the KV pool's buffers, per layer [num_slots, n_kv, d], dummy slot and page padding included.
        num_device_rows: rows that may be in borrowed slots at a time.
        eviction: which rows go first: `value` (see `appraisal.py`) or `lru`.
        is_deferred: whether what depends on values of the device is done by `settle`; None: on a GPU.
        """
        self.layout, self._lender = layout, lender
        self.num_device_rows, self.num_host_rows = num_device_rows, num_host_rows
        self._eviction = eviction
        num_slots, num_records = k[0].shape[0], num_device_rows + num_host_rows
        specs = {
            "gens": ((num_records,), torch.int64),
            "cells": ((num_device_rows, layout.slots_per_row), torch.int64),
            "counts": ((2,), torch.int64),
        }
        self._tables = Arena("row-tables", specs, populate=True)
        self.gens = self._tables.tensors["gens"].numpy()
        self._gens_view = self.gens.data
        self._pages_per_row = layout.slots_per_row // lender.page_size
        counts = self._tables.tensors["counts"].numpy()
        self.arrivals = Arrivals(k[0].device, counts, is_deferred=is_deferred)
        place = (layout, k, v, self._tables.tensors["cells"], lender)
        self.device: DeviceTier
        if self.arrivals.is_deferred:
            self.device = GpuTier(*place, num_host_rows=num_host_rows)
        else:
            self.device = DeviceTier(*place)
        self.host = HostTier(layout, num_host_rows)
        if k[0].is_cuda:
            self.host.pin()
        # By record.
        self.state = np.zeros(num_records, np.int8)
        self._gen, self._refs = np.zeros((2, num_records), np.int64)
        self._slot, self._device, self._host = np.full((3, num_records), -1)
        self._value, self._cost = np.zeros((2, num_records))
        self._lacks_kv = np.zeros(num_records, bool)
        """Whether a row on the host still waits for its keys and values, which are in the KV cache."""
        self._is_ready = np.ones(num_records, bool)
        """Whether what a row holds is in its place; on a GPU, rows on the host come there late."""
        # By what finds a record.
        self.record_of_slot = np.full(num_slots, -1)
        self._record_of_device = np.full(num_device_rows, -1)
        self._record_of_host = np.full(num_host_rows, -1)
        self._free_records = IdStack(np.arange(num_records))
        self._free_host = IdStack(np.arange(num_host_rows))
        self._line, self._copied_line = (Line(self.gens, num_device_rows) for _ in range(2))
        """All device rows, those worth least first, and those that have a copy: by their value when they were last
        lined up, and after them, as they came.
        """
        self._ready: Ready | None = None
        """What serving gets next; some of it may be gone: see `_catch_up`."""
        self._waiting: list[tuple[Begun, torch.Tensor, torch.Tensor]] = []
        """See `record_later`: what it returned, slots and positions."""
        self._waits = np.zeros(self.record_of_slot.size, dtype=bool)
        """Which KV slots are those of tokens that wait."""
        self._to_hedge: deque[tuple[Ids, Ids]] = deque()
        self._num_to_hedge = 0
        self.answers = Answers(self._gen)
        _, self._first_rate = self.answers.rates(0.0)
        self._half_flops = layout.half_flops_position
        self._tick = 0
        self.num_lost = 0
        """Tokens that were to be recorded and found no room."""
        self.num_skipped = 0
        """Tokens that were not to be recorded because copying them would have taken serving's time."""
        self.num_dropped = 0
        """Rows that ended without a copy because their slots were wanted."""
        self.num_hedged = 0
        self._copied_bytes, self._copy_s = 0, 0.0
        self._staged_slots = torch.empty(0, dtype=torch.int64)
        self._num_copying = 0
        """Host rows that a copy is on its way to."""
        self.stopped: str | None = None
        """Why nothing is recorded any more."""

    @property
    def handles(self) -> tuple[list[TensorHandle], TensorHandle, TensorHandle, TensorHandle]:
        """Handles of the host rows, one tensor a layer, of `gens`, of the device rows' cells, and of the counts of
        `arrivals.py`.
        """
        tables = self._tables.handles
        return self.host.handles, tables["gens"], tables["cells"], tables["counts"]

    def install(self, harmless: Callable[[Any, Any], Any] = lambda call, default: call) -> None:
        """Begin to borrow.

        Args:
            harmless: (a function that serving calls, what it is to return if it fails) → one that never fails.
        """
        self._lender.install(
            self.arrivals,
            harmless(self.give_back, 0),
            harmless(self.free_slots, None),
            harmless(self.clear, None),
            harmless(self._lender.stay_last, None),
        )
        self._restock()

    def stop(self, why: str) -> None:
        """Every row ends, every loan goes back, and nothing may be recorded any more. For when something has failed:
        relies on no table that may be half changed, and takes next to no memory.
        """
        self.stopped = why
        # First of all, as in `_change`.
        self.gens += 1
        self._gen += 1
        for table in (self.record_of_slot, self._slot, self._device, self._host):
            table.fill(-1)
        for table in (self._record_of_device, self._record_of_host):
            table.fill(-1)
        for table in (self.state, self._refs, self.answers.wants):
            table.fill(0)
        self._to_hedge.clear()
        self._num_to_hedge = 0
        self._waiting.clear()
        self._waits.fill(False)
        self._ready = None
        self._line.reset(_NOBODY)
        self._copied_line.reset(_NOBODY)
        self.arrivals.forget()
        self._lender.give_all()

    # On a GPU

    def settle(self, *, wait: bool = False) -> None:
        """On a GPU, do what waits for the device, as far as it has come; with `wait`, all of it. To be called once a
        loop.
        """
        if isinstance(self.device, GpuTier):
            if not (len(self.arrivals) or self.device.num_copies or self._lacks_stock):
                # What was made ready for serving stays.
                return
            # Rows with borrowed slots may come below, and copies be complete.
            self._catch_up()
            self._restock()
            self.device.finish_copies()
            while wait and self.device.num_copies:
                self.device.finish_copies(wait=True)
            self.arrivals.settle(wait=wait)

    @property
    def is_settled(self) -> bool:
        """Whether nothing waits for the device."""
        is_copying = isinstance(self.device, GpuTier) and self.device.num_copies > 0
        return not len(self.arrivals) and not is_copying

    @property
    def copies_aside(self) -> bool:
        """Whether `hedge` would only enqueue a copy now, beside serving's work: not on the CPU, nor while one runs."""
        return isinstance(self.device, GpuTier) and not self.device.num_copies

    def _restock(self) -> None:
        """Have rows in hand that can be recorded into. Not as soon as one is gone, nor while serving is about to want
        what is lent: it would be handed to and fro.
        """
        if self._lacks_stock:
            self.device.borrow(min(STOCK, self.num_device_rows))

    @property
    def _lacks_stock(self) -> bool:
        if not isinstance(self.device, GpuTier) or self.stopped is not None:
            return False
        few = min(STOCK, self.num_device_rows) // 2
        return len(self.device.spare) <= few and self._lender.has_plenty

    # Recording

    @caught_up
    def record(
        self, slots: torch.Tensor, positions: torch.Tensor, *, is_graph: bool = False
    ) -> Ids:
        """Begin rows for tokens; what the slots had ends.

        Args:
            slots: [n] int64, distinct, without the dummy slot 0; on the KV pool's device.
            positions: [n] of the tokens in their sequences; on the CPU.
            is_graph: the pass is a CUDA graph's, which can write to rows on the device only.

        Returns:
            [m] rows of the first m ≤ n tokens: as many as there is room for, first on the device, then on the host.
        """
        return self._record(slots, positions, is_graph)

    def record_later(self, slots: torch.Tensor, positions: torch.Tensor) -> Begun:
        """As `record`, when the tables are next looked at, or by `begin_waiting`: tokens of many passes together.
        Not where values of the device are deferred.
        """
        assert not self.arrivals.is_deferred
        begun = Begun()
        self._waiting.append((begun, slots, positions))
        self._waits[slots.numpy()] = True
        return begun

    def begin_waiting(self) -> None:
        """Begin the rows of tokens that wait for it."""
        if not self._waiting:
            return
        self._catch_up()
        waiting, self._waiting = self._waiting, []
        self._waits.fill(False)
        all_begun, slots, positions = zip(*waiting, strict=True)
        rows = self._record(torch.cat(slots), torch.cat(positions))
        gens, start = self.gens[rows], 0
        for begun, own in zip(all_begun, slots, strict=True):
            part = slice(start, start + own.numel())
            begun.rows, begun.gens, start = rows[part], gens[part], part.stop

    def _record(self, slots: torch.Tensor, positions: torch.Tensor, is_graph: bool = False) -> Ids:
        if not self.arrivals.is_deferred:
            self._leave(slots.numpy())
        self._tick += 1
        cost = 1 + positions.numpy() / self._half_flops
        is_lru = self._eviction == "lru"
        value = np.full_like(cost, self._tick) if is_lru else cost * self._first_rate
        total = count = self._provide(slots.numel())
        rest = slots.numel() - count
        if isinstance(self.device, GpuTier):
            rest = 0 if is_graph else min(rest, self.device.staging.room)
        total += self._provide_host(rest, float(value.min(initial=np.inf)))
        self.num_lost += slots.numel() - total
        records = self._free_records.pop(total)
        rows: Ids = np.concatenate(
            (self.device.take(count), np.sort(self._free_host.pop(total - count)))
        )
        self._cost[records], self._value[records] = cost[:total], value[:total]
        mine, theirs = records[:count], records[count:]
        self._record_of_device[rows[:count]], self._device[mine] = mine, rows[:count]
        self._line.append(rows[:count])
        self._record_of_host[rows[count:]], self._host[theirs] = theirs, rows[count:]
        rows[count:] += self.num_device_rows
        self._change(mine, RowEvent.RECORD)
        self._change(theirs, RowEvent.RECORD_HOST)
        if not isinstance(self.device, GpuTier):
            self._lacks_kv[mine], self._lacks_kv[theirs] = False, True
        elif theirs.size:
            self._is_ready[theirs], self.device.staging.is_free = False, False
            self._staged_slots = slots[count:total]
        bind = partial(self._bind, records, self._gen[records], count)
        self.arrivals.hold((slots,), bind)
        return rows

    def _bind(self, records: Ids, gens: Ids, count: int, slots: torch.Tensor) -> None:
        """The slots of tokens whose rows were begun, the first `count` of them on the device. On a GPU what the rows
        hold is complete now, and some may have ended since.
        """
        if self.arrivals.is_deferred:
            self._leave(slots.numpy())
        own = slots.numpy()[: records.size]
        alive = self._gen[records] == gens
        self.record_of_slot[own[alive]], self._slot[records[alive]] = records[alive], own[alive]
        mine = records[:count][alive[:count]]
        if self.num_host_rows and mine.size:
            self._to_hedge.append((mine, self._gen[mine]))
            self._num_to_hedge += mine.size
            if self._num_to_hedge > 2 * self.num_device_rows:
                self._forget_ended()

    def _forget_ended(self) -> None:
        """Of the rows that wait for their copy keep those that are: on a server that is never idle most have ended."""
        records, gens = (np.concatenate(part) for part in zip(*self._to_hedge, strict=True))
        waits = (self._gen[records] == gens) & (self.state[records] == RowState.DEVICE)
        self._to_hedge = deque([(records[waits], gens[waits])])
        self._num_to_hedge = int(waits.sum())

    def write(self, layer: int, field: str, rows: Ids, value: torch.Tensor) -> None:
        """Store a field [n, `layout.widths`] of `rows` [n], those on the device before those on the host."""
        if self.layout.is_encoded(field):
            value = fp8_rows.encode(value)
        count = int((rows < self.num_device_rows).sum())
        if count:
            self.device.write(layer, field, rows[:count], value[:count])
        if count < rows.size:
            self.host.write(layer, field, rows[count:] - self.num_device_rows, value[count:])

    def complete(self, rows: Ids) -> None:
        """Keys and values of the rows' tokens are in the KV cache: copy those of rows on the host."""
        hosted = rows[rows >= self.num_device_rows] - self.num_device_rows
        records = self._record_of_host[hosted]
        self.arrivals.go()
        if not hosted.size:
            return
        if isinstance(self.device, GpuTier):
            staged = partial(self._staged, records, self._gen[records])
            self.device.send_staged(self.host, self._staged_slots, hosted, staged)
        else:
            self._copy_kv(records)

    def _copy_kv(self, records: Ids) -> None:
        """Copy keys and values that rows on the host wait for, if they do."""
        records = records[self._lacks_kv[records]]
        if records.size:
            self.device.copy_kv_to(self.host, self._slot[records], self._host[records])
            self._lacks_kv[records] = False

    def _staged(self, records: Ids, gens: Ids) -> None:
        """Rows that were recorded on the host are there now; some may have ended since."""
        self._is_ready[records[self._gen[records] == gens]] = True

    def still(self, rows: Ids, gens: Ids) -> np.ndarray:
        """Which rows are still what they were when their generations were `gens`: bool [n]."""
        same: np.ndarray = self.gens[rows] == gens
        return same

    def free_slots(self, slots: torch.Tensor) -> None:
        """The KV slots, on the KV pool's device, are freed, and with them the others of their pages. Slots without a
        row are fine.
        """
        if slots.numel():
            self.arrivals.then((slots,), self._end_slots)

    def _end_slots(self, slots: torch.Tensor) -> None:
        index = slots.numpy()
        page = self._lender.page_size
        if page > 1:
            pages = np.unique(index // page)
            index = (pages[:, None] * page + np.arange(page)).reshape(-1)
        if self._waiting and self._waits[index].any():
            self.begin_waiting()
        # Serving frees slots and wants others in the same loop: what is ready for it stays.
        self._enter()
        if self._ready is not None:
            self._ready.is_stale = True
        self._leave(index)

    def _leave(self, index: Ids) -> None:
        """The tokens in KV slots `index` leave the cache, or others are written there."""
        records = self.record_of_slot[index]
        records = records[records >= 0]
        if not records.size:
            return
        wanted = self.answers.wants[records] > 0
        # Their other values may come later, these are overwritten.
        self._copy_kv(records[wanted])
        self.record_of_slot[self._slot[records]] = -1
        self._slot[records] = -1
        self._change(records[~wanted], RowEvent.SLOT_FREED)
        self._change(records[wanted], RowEvent.SLOT_LOST)

    def clear(self) -> None:
        """The KV pool is flushed and every loan with it: rows live on on the host only, where they are wanted."""
        self.settle(wait=True)
        self._catch_up()
        self._waiting.clear()
        self._waits.fill(False)
        held = self._slot[self._slot >= 0]
        if held.size:
            self._end_slots(torch.from_numpy(held))
        self.device.give_back(self.num_device_rows)

    # Lending

    def give_back(self, need: int, welcome: int) -> int:
        """End the rows in the pages that are first in the allocator's list: `need` slots of them, or all, and up to
        `welcome` if no row is lost by it. How many pages: whole rows'.
        """
        size = self.layout.slots_per_row
        count, more = -(-need // size), -(-max(need, welcome) // size)
        if self._ready is None or count > self._ready.num_left:
            # Tokens that wait go on waiting: their rows would take what serving wants.
            self._catch_up()
            spare = self.device.spare
            self._evict(more - len(spare), only_copied=True)
            self._evict(count - len(spare), only_copied=False)
            pages = self.device.give_back(more)
            self._lender.line_up(pages)
            return int(pages.size)
        # A reader of what serving writes there next sees that the row has ended; the tables can wait.
        return self._ready.take(count, more, self._gens_view) * self._pages_per_row

    def prepare(self) -> None:
        """Choose the rows that serving gets next if it wants slots. To be called last in a loop: whatever else looks at
        the tables undoes it.
        """
        if not self._lender.num_lent or self._lender.has_plenty:
            return
        room = READY_SLOTS // self.layout.slots_per_row
        ready = self._ready
        if ready is not None and not ready.is_stale:
            is_all = ready.rows.size < room
            if is_all or ready.num_left > room // 2:
                return
        self._catch_up()
        spare = self.device.spare.all()[::-1][:room]
        copied, lone = self._next(room - spare.size)
        rows = np.concatenate((spare, copied, lone))
        num_free = spare.size + copied.size
        self._lender.line_up(self.device.pages(rows).reshape(-1))
        self._ready = Ready(rows, self.gens[rows] + 1, num_free=num_free)

    def _catch_up(self) -> None:
        """Bring the tables up to date; nothing is ready any more."""
        self._enter()
        self._ready = None

    def _enter(self) -> None:
        """Enter into the tables what serving has taken of the rows that were ready."""
        rows = _NOBODY if self._ready is None else self._ready.enter()
        if rows.size:
            records = self._record_of_device[rows]
            self._reclaim(records[records >= 0])
            self.device.gone(rows)

    def _provide(self, count: int) -> int:
        """Have spare rows for `count` tokens; for how many there are."""
        if not self.arrivals.is_deferred:
            self.device.borrow(count)
        if count > len(self.device.spare):
            missing = count - len(self.device.spare)
            self._evict(missing, only_copied=self.num_host_rows > 0, only_unread=True)
        return min(count, len(self.device.spare))

    def _provide_host(self, count: int, value: float) -> int:
        """Have free host rows for `count` tokens worth `value`; for how many there are."""
        if count > len(self._free_host):
            self._make_room(count - len(self._free_host), value)
        return min(count, len(self._free_host))

    def _evict(self, count: int, only_copied: bool, only_unread: bool = False) -> None:
        """End the device places of up to `count` rows, the least valuable first, those being read last."""
        copied, lone = self._next(count)
        rows = copied if only_copied else np.concatenate((copied, lone))
        self._reclaim(self._record_of_device[rows])
        if only_copied or only_unread or count <= rows.size:
            return
        records = self._record_of_device[self._record_of_device >= 0]
        key = self._value[records] + 1e9 * (self._host[records] < 0)
        self._reclaim(records[np.argsort(key)[: count - rows.size]])

    def _next(self, count: int) -> tuple[Ids, Ids]:
        """The next `count` device rows that nobody reads, as far as there are: those with a copy, then the others."""
        copied = self._copied_line.peek(count, partial(self._is_unread, is_copied=True))
        rest = count - copied.size
        return copied, self._line.peek(rest, partial(self._is_unread, is_copied=False))

    def _is_unread(self, rows: Ids, *, is_copied: bool) -> np.ndarray:
        records = self._record_of_device[rows]
        found: np.ndarray = ((self._host[records] >= 0) == is_copied) & (self._refs[records] == 0)
        return found

    def _reclaim(self, records: Ids) -> None:
        self.num_dropped += int((self._host[records] < 0).sum())
        self._change(records, RowEvent.RECLAIM)

    def _line_up(self) -> None:
        records = self._record_of_device[self._record_of_device >= 0]
        records = records[np.argsort(self._value[records])]
        self._line.reset(self._device[records])
        self._copied_line.reset(self._device[records[self._host[records] >= 0]])

    # Hedging

    @property
    def num_to_hedge(self) -> int:
        """Rows that wait for their copy; some may have ended meanwhile."""
        return self._num_to_hedge

    @caught_up
    def hedge(self, max_rows: int) -> int:
        """Copy up to `max_rows` rows, with keys and values, to the host; how many. Recorded values must be in place."""
        if isinstance(self.device, GpuTier) and self.device.num_copies >= MAX_COPIES:
            self.device.finish_copies(wait=True)
            self.arrivals.settle()
        while self._to_hedge:
            records, gens = self._to_hedge.popleft()
            self._num_to_hedge -= records.size
            fresh = (self._gen[records] == gens) & (self.state[records] == RowState.DEVICE)
            records, gens = records[fresh], gens[fresh]
            if records.size > max_rows:
                self._to_hedge.appendleft((records[max_rows:], gens[max_rows:]))
                self._num_to_hedge += records.size - max_rows
                records = records[:max_rows]
            if not records.size:
                continue
            if records.size > len(self._free_host):
                self._make_room(records.size - len(self._free_host), self._value[records].min())
            records = records[: len(self._free_host)]
            if not records.size:
                continue
            to = np.sort(self._free_host.pop(records.size))
            self._num_copying += to.size
            started = time.perf_counter()
            hedged = partial(self._hedged, records, self._gen[records], to, started)
            # Slots that were freed before the copy was complete have to be known before it counts as one.
            self.device.copy_to(
                self.host,
                self._device[records],
                self._slot[records],
                to,
                partial(self.arrivals.then, (), hedged),
            )
            return int(records.size)
        return 0

    def _hedged(self, records: Ids, gens: Ids, to: Ids, started: float) -> None:
        """Copies of rows are complete in the host rows `to`; rows may have ended meanwhile."""
        self._copy_s += time.perf_counter() - started
        self._copied_bytes += to.size * self.layout.row_bytes
        self._num_copying -= to.size
        alive = self._gen[records] == gens
        self._free_host.push(to[~alive])
        records, to = records[alive], to[alive]
        self._host[records], self._record_of_host[to] = to, records
        self._change(records, RowEvent.HEDGE)
        self.num_hedged += records.size
        self._copied_line.append(self._device[records])

    def _make_room(self, count: int, value: float) -> None:
        """Take up to `count` rows worth less than `value` from the host; none that the trainer is reading."""
        (records,) = np.nonzero(_ON_HOST[self.state] & (self._refs == 0) & (self._value < value))
        # Many at a time, so that the search is not repeated for every portion.
        count = max(count, self.num_host_rows // 64)
        if count < records.size:
            records = records[np.argpartition(self._value[records], count - 1)[:count]]
        self._change(records, RowEvent.UNHEDGE)

    # Answers

    @caught_up
    def finish(
        self,
        rid: str,
        slots: torch.Tensor,
        length: int,
        now: float,
        served_by: str = "",
        text: Text | None = None,
    ) -> None:
        """A request has ended. It may be voted on from now on.

        Args:
            slots: of its prompt's prefix that is in the KV cache.
            length: of the prompt.
            now: monotonic seconds, here and below.
            served_by: adapter; "": the base model.
            text: what has been served: rows are found by the id for as much of it as is asked for; None: for any.
        """
        records = np.full(length, -1)
        records[: slots.numel()] = self.record_of_slot[slots.numpy()]
        self._unwanted(self.answers.add(rid, records, now, served_by, text))

    def voted(self, rid: str, now: float) -> None:
        """A vote on the completion has come: its rows will be read soon."""
        self.answers.voted(rid, now)

    def is_fresh(self, served_by: str) -> bool:
        """Whether rows of the adapter's answers would be read."""
        return self.answers.is_fresh(served_by)

    def keep_fresh(self, adapters: Iterable[str], now: float) -> None:
        """Another version is live: see `Answers.keep_fresh`. Rows of other answers are worth nothing from the next
        `appraise` on.
        """
        self.answers.keep_fresh(adapters, now)

    def consumed(self, rid: str, now: float) -> None:
        """The completion's vote was trained."""
        self.answers.consumed(rid, now)

    @caught_up
    def forget(self, rid: str, now: float) -> None:
        """Do not keep rows for the completion any longer."""
        self._unwanted(self.answers.drop(rid, now))

    def _unwanted(self, records: Ids) -> None:
        # Some may have been wanted again since, or have ended.
        still = (self.answers.wants[records] == 0) & (self.state[records] != RowState.FREE)
        self._change(np.unique(records[still]), RowEvent.UNWANTED)

    @caught_up
    def appraise(self, now: float) -> None:
        """Bring the rows' values up to date; what `lru` needs is kept as rows are used."""
        if self._eviction == "value":
            rates, self._first_rate = self.answers.rates(now)
            np.multiply(self._cost, rates, out=self._value)
            self._line_up()

    # Reading

    @caught_up
    def num_held(self, rid: str, slots: torch.Tensor, length: int, text: Text | None = None) -> int:
        """How many of a prompt's tokens have a row now; `slots`: of its cached prefix."""
        return int((self._find(rid, slots, length, text) >= 0).sum())

    @caught_up
    def check_out(
        self, rid: str, slots: torch.Tensor, length: int, text: Text | None = None
    ) -> CheckedOut:
        """Where the tokens of a completion's prompt are recorded: by the KV cache, else as the completion left them.
        They are not taken for newer rows until `check_in`; serving may still take their slots.

        Args:
            slots: of the prompt's prefix that is in the KV cache now.
            length: of the prompt.
            text: the prompt, see `finish`.
        """
        records = self._find(rid, slots, length, text)
        held = records[records >= 0]
        self._refs[held] += 1
        if self._eviction == "lru":
            self._tick += 1
            self._value[held] = self._tick
            self._line_up()
        device = np.where(records >= 0, self._device[records], -1)
        host = np.where(records >= 0, self._host[records], -1)
        host = np.where(host >= 0, host + self.num_device_rows, -1)
        rows = np.where(device >= 0, device, host)
        return CheckedOut(
            slots=np.where(records >= 0, self._slot[records], 0),
            rows=rows,
            gens=np.where(rows >= 0, self.gens[rows], 0),
            hedge_rows=host,
            hedge_gens=np.where(host >= 0, self.gens[host], 0),
            ticket=(held, self._gen[held]),
        )

    def check_in(self, ticket: tuple[Ids, Ids]) -> None:
        """The reader is done. Rows that ended meanwhile have no count left to lower."""
        records, gens = ticket
        self._refs[records[self._gen[records] == gens]] -= 1

    def _find(self, rid: str, slots: torch.Tensor, length: int, text: Text | None) -> Ids:
        records = np.full(length, -1)
        found = self.record_of_slot[slots.numpy()[:length]]
        records[: found.size] = found
        completion = self.answers.get(rid)
        if completion is not None:
            # It may have been recorded without the answer that is asked for, or with one that is not.
            if text is not None and completion.text is not None:
                length = min(length, completion.text.shared(text))
            own = np.where(completion.is_alive(self._gen), completion.records, -1)[:length]
            head = records[: own.size]
            records[: own.size] = np.where(head >= 0, head, own)
        return np.where(self._is_ready[records], records, -1)

    # The table at work

    def _change(self, records: Ids, event: RowEvent) -> None:
        """Apply an event to records, and end the places that they lose by it."""
        if not records.size:
            return
        was = self.state[records]
        now = _NEXT[event][was]
        assert (now >= 0).all(), f"{event} in states {set(was[now < 0].tolist())}"
        self.state[records] = now
        lost = records[_ON_DEVICE[was] & ~_ON_DEVICE[now]]
        if lost.size:
            rows = self._device[lost]
            # First of all: a reader that sees new content also sees the new generation.
            self.gens[rows] += 1
            self._record_of_device[rows] = self._device[lost] = -1
            self.device.spare.push(rows)
        lost = records[_ON_HOST[was] & ~_ON_HOST[now]]
        if lost.size:
            rows = self._host[lost]
            self.gens[rows + self.num_device_rows] += 1
            self._record_of_host[rows] = self._host[lost] = -1
            self._free_host.push(rows)
        ended = records[now == RowState.FREE]
        if ended.size:
            slots = self._slot[ended]
            self.record_of_slot[slots[slots >= 0]] = -1
            self._slot[ended] = -1
            self._gen[ended] += 1
            self._is_ready[ended] = True
            self._refs[ended] = self.answers.wants[ended] = 0
            self._free_records.push(ended)

    # Figures

    @caught_up
    def stats(self) -> dict[str, Any]:
        """Counts for metrics: rows by state, backlog, losses, and how long serving waited for its slots."""
        counts = np.bincount(self.state, minlength=len(RowState))
        # Fewer than a thousand slots count as a thousand: they take no less.
        per_1000 = [1e6 * s / max(1.0, slots / 1000) for slots, s in self._lender.reclaims]
        return {
            "rows": {s.name.lower(): int(counts[s]) for s in RowState if s is not RowState.FREE},
            "device_rows": self.num_device_rows,
            "host_rows": self.num_host_rows,
            "slots_borrowed": self._lender.num_lent * self._lender.page_size,
            "slots_reclaimed": self._lender.num_reclaimed,
            "reclaim_p99_us_per_1000": float(np.percentile(per_1000, 99)) if per_1000 else None,
            "hedge_backlog": self.num_to_hedge,
            "hedged": self.num_hedged,
            "hedge_bytes_per_s": self._copied_bytes / self._copy_s if self._copy_s else None,
            "lost": self.num_lost,
            "skipped": self.num_skipped,
            "dropped": self.num_dropped,
            "stopped": self.stopped,
            "completions": len(self.answers),
            "tokens_voted": self.answers.num_voted_tokens,
            "tokens_voted_held": self.answers.num_voted_held,
        }

    @caught_up
    def check_integrity(self) -> None:
        """Recompute every derived set from scratch; AssertionError names what does not agree."""
        used = self.state != RowState.FREE
        if self.stopped is not None:
            assert not used.any(), "a row after the end"
            assert self._lender.num_lent == 0, "a loan after the end"
            return
        (records,) = np.nonzero(used)
        (free,) = np.nonzero(~used)
        assert set(self._free_records.all()) == set(free), "free records"
        for place, on, size in (
            (self._device, _ON_DEVICE, self.num_device_rows),
            (self._host, _ON_HOST, self.num_host_rows),
        ):
            held = place[on[self.state]]
            assert (place[~on[self.state]] == -1).all(), "a place without a row"
            assert set(held) <= set(range(size)), "a place that is none"
            assert len(set(held)) == held.size, "a place twice"
        (held,) = np.nonzero(self._record_of_device >= 0)
        assert (self._device[self._record_of_device[held]] == held).all(), "device row ↔ record"
        self.device.check_integrity(held)
        (rows,) = np.nonzero(self._record_of_host >= 0)
        assert (self._host[self._record_of_host[rows]] == rows).all(), "host row ↔ record"
        host = self._host[_ON_HOST[self.state]]
        assert self._num_copying == 0, "host rows between two owners"
        assert sorted([*host, *self._free_host.all()]) == list(range(self.num_host_rows)), "host"
        (slots,) = np.nonzero(self.record_of_slot >= 0)
        assert (self._slot[self.record_of_slot[slots]] == slots).all(), "slot ↔ record"
        assert int((self._slot >= 0).sum()) == slots.size, "a record names a slot not its own"
        has_slot = self._slot[records] >= 0
        assert (has_slot == (self.state[records] != RowState.DETACHED)).all(), "slots by state"
        assert (self._refs >= 0).all(), "negative readers"
        assert (self._refs[free] == 0).all(), "readers of nothing"
        assert (self.answers.count_wants() == self.answers.wants).all(), "wants"
