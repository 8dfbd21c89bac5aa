"""Recorded rows where the trainer computes on a GPU: read in the order of its stream, and proved afterwards.

Rows on the device are gathered from the imported KV pool by one kernel a field; their keys and values can also be read
there, by attention itself. Rows on the host are copied whole, a layer ahead of the backward pass or two, on a stream of
their own.

What is fetched has not been read when `fetch` returns, so `check` can only find out early what is lost already.
`confirm` is the proof: it waits until everything that was enqueued is done, then until the server has settled what ends
of rows it knew of by then (see `counts`), and compares generations after that. Nothing that was computed from rows may
leave the step before. Not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alchemist.kernels.pack_rows import Field, unpack_rows
from alchemist.protocol.layout import RowLayout
from alchemist.protocol.streams import Moment, to_device

from .rows import ActivationView, RowsRevoked

DEPTH = 2
"""Layers whose host rows are copied ahead of the one that is being computed."""
SETTLE_S = 5.0
"""How long the server may take to settle; then every row counts as lost."""


class _Places(NamedTuple):
    """A batch's rows by tier, on the device but for the last."""

    num_device: int
    local: Tensor  # [n] row of `cells`, −1: on the host
    cells: Tensor  # [device rows, slots_per_row]
    at_device: Tensor
    at_host: Tensor
    host_rows: np.ndarray


class _Copy(NamedTuple):
    """A layer's host rows on the device, [host rows, width], once the moment has come."""

    places: _Places
    rows: Tensor
    done: Moment


class GpuView(ActivationView):
    """Borrowed tensors, as in `ActivationView`; `k` and `v` on a GPU, the rest on the host.

    Args:
        host: per layer [host rows, layout.width], page-locked.
        counts: [2] int64: ends of rows that have begun, and those that show in `gens`.
    """

    def __init__(
        self,
        layout: RowLayout,
        host: Sequence[Tensor],
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        gens: Tensor,
        cells: Tensor,
        counts: Tensor,
    ) -> None:
        super().__init__(layout, host, k, v, gens, cells)
        self._device, self._counts = k[0].device, counts
        self._side = torch.cuda.Stream(self._device) if k[0].is_cuda else None
        self._known: list[tuple[Tensor, Tensor]] = []
        self._located: list[tuple[Tensor, _Places]] = []
        self._unproven: list[tuple[Tensor, Tensor]] = []
        self._ahead: dict[tuple[int, int], _Copy] = {}
        """By layer and places."""

    def _read(self, layer: int, field: str, rows: Tensor, out: Tensor) -> None:
        """One field as it is stored, [n, elements], contiguous in them."""
        start, width = self._fields[field]
        places = self._find(rows)
        if places.num_device:
            into = Field(out, start // self.layout.cell)
            keys, values = self._planes[layer]
            unpack_rows([into], places.local, places.cells, keys, values)
        if places.host_rows.size:
            out[places.at_host] = self._from_host(layer, places)[:, start : start + width]

    def fetch_kv(
        self, layer: int, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Keys and values [n, n_kv, d] of `rows`, whose tokens are in `slots`, into `keys`, `values`."""
        places = self._find(rows)
        if places.num_device:
            own = slots.to(self._device)[places.at_device]
            keys[places.at_device] = self._k[layer][own].to(keys.dtype)
            values[places.at_device] = self._v[layer][own].to(values.dtype)
        if places.host_rows.size:
            start, cell = self._fields["keys"][0], self.layout.cell
            found = self._kv_from_host(layer, places, start)
            for part, pool, out in (
                (found[:, :cell], self._k[layer], keys),
                (found[:, cell:], self._v[layer], values),
            ):
                kept = part.contiguous().view(pool.dtype).view(-1, *pool.shape[1:])
                out[places.at_host] = kept.to(out.dtype)

    def in_pool(self, rows: Tensor) -> Tensor:
        """bool [n] on the CPU: whose keys and values are in the pool, in their tokens' slots."""
        return self._on_cpu(rows) < self.num_device

    def pool(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of every slot, [slots, n_kv, d]: serving's own, lent. What reads them must be enqueued on the
        current stream before `check`; nothing is known of it before `confirm`.
        """
        return self._k[layer], self._v[layer]

    def prefetch(self, layer: int, rows: Tensor) -> None:
        """Begin to copy host rows of a layer and of those below it."""
        places = self._find(rows)
        if places.host_rows.size:
            for ahead in range(layer, max(-1, layer - 1 - DEPTH), -1):
                if (ahead, id(places)) not in self._ahead:
                    self._copy(ahead, places)

    def check(self, rows: Tensor, gens: Tensor) -> None:
        """Raises RowsRevoked if any of `rows` is already known not to be of generation `gens`."""
        pair = self._on_cpu(rows), self._on_cpu(gens)
        if not any(pair[0] is known[0] and pair[1] is known[1] for known in self._unproven):
            self._unproven.append(pair)
        self._compare([pair])

    def confirm(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._ahead.clear()
        begun, deadline = int(self._counts[0]), time.monotonic() + SETTLE_S
        while int(self._counts[1]) < begun:
            if time.monotonic() > deadline:
                every = torch.cat([rows for rows, _ in self._unproven]).tolist()
                self._unproven.clear()
                raise RowsRevoked(every)
            time.sleep(0.0005)
        self._compare(self._unproven)
        self._unproven.clear()

    def forget(self) -> None:
        self._ahead.clear()
        self._unproven.clear()

    def _compare(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        lost = {row for rows, gens in pairs for row in rows[self._gens[rows] != gens].tolist()}
        if lost:
            # What else was read for the same result is read again with it.
            self._unproven.clear()
            raise RowsRevoked(sorted(lost))

    def _find(self, rows: Tensor) -> _Places:
        # A batch asks for the same rows, field by field and layer by layer.
        for known, places in self._located:
            if known is rows:
                return places
        on_cpu = self._on_cpu(rows)
        on_device = on_cpu < self.num_device
        local = torch.where(on_device, on_device.cumsum(0) - 1, -1)
        (at_device,), (at_host,) = torch.where(on_device), torch.where(~on_device)
        # Where a row's cells are is read once, before its content and before `check`: a row that moves changes its
        # generation first.
        places = _Places(
            int(at_device.numel()),
            self._move(local),
            self._move(self._cells[on_cpu[at_device]]),
            self._move(at_device),
            self._move(at_host),
            (on_cpu[at_host] - self.num_device).numpy(),
        )
        self._located = [*self._located[-7:], (rows, places)]
        return places

    def _move(self, tensor: Tensor) -> Tensor:
        return to_device(tensor.numpy(), self._device)

    def _on_cpu(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        for known, copy in self._known:
            if known is tensor:
                return copy
        copy = tensor.cpu()
        self._known = [*self._known[-7:], (tensor, copy)]
        return copy

    def _from_host(self, layer: int, places: _Places) -> Tensor:
        """A layer's host rows, [host rows, layout.width]; the current stream waits for them."""
        if (layer, id(places)) not in self._ahead:
            self._copy(layer, places)
        copy = self._ahead[layer, id(places)]
        copy.done.before(self._device)
        if copy.rows.is_cuda:
            copy.rows.record_stream(torch.cuda.current_stream(self._device))
        return copy.rows

    def _copy(self, layer: int, places: _Places) -> None:
        rows = places.host_rows
        aside = torch.cuda.stream(self._side) if self._side else contextlib.nullcontext()
        with aside:
            source = self._host[layer]
            out = torch.empty(len(rows), source.shape[1], dtype=source.dtype, device=self._device)
            breaks = np.flatnonzero(np.diff(rows) != 1) + 1
            for begin, end in zip([0, *breaks], [*breaks, len(rows)], strict=True):
                first = int(rows[begin])
                out[begin:end].copy_(source[first : first + end - begin], non_blocking=True)
            self._ahead[layer, id(places)] = _Copy(places, out, Moment(self._device))
        # Those ahead, the one in use, and its rows that are wanted for the head.
        while len(self._ahead) > DEPTH + 2:
            self._ahead.pop(next(iter(self._ahead)))

    def _kv_from_host(self, layer: int, places: _Places, start: int) -> Tensor:
        """Keys and values of host rows, [host rows, 2 cells]. Where the whole rows are not wanted, only these."""
        if (layer, id(places)) in self._ahead:
            return self._from_host(layer, places)[:, start:]
        found = self._host[layer][:, start:][torch.from_numpy(places.host_rows)]
        if self._device.type == "cpu":
            return found
        return found.pin_memory().to(self._device, non_blocking=True)
