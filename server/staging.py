"""Where rows that found no slot wait on a GPU until they are on the host.

A KV cache that has been busy for a while has no free slots, because old prefixes fill it. On the CPU what is recorded
then goes to the host at once; a GPU cannot write there in the middle of a pass without being held up. So a prefill's
tokens, as many as there is room for here, are kept in memory of the pool's own until the pass is done, and copied
beside whatever comes next. One pass at a time: what comes before the copy is complete is not recorded in this way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alchemist.protocol.layout import RowLayout

STAGING_BYTES = 1 << 30
"""Of GPU memory, if there are so many rows on the host; some 400 tokens of an 8B model."""


class Staging:
    """Attributes:
    rows: per layer [num_rows, layout.width], as rows lie on the host.
    is_free: whether no pass has its rows here.
    """

    def __init__(self, layout: RowLayout, num_rows: int, device: torch.device) -> None:
        self.num_rows, self.is_free = num_rows, True
        self._fields = layout.fields
        dtype = getattr(torch, layout.dtype)
        self.rows = [
            torch.empty(num_rows, layout.width, dtype=dtype, device=device)
            for _ in range(layout.num_layers)
        ]

    @property
    def room(self) -> int:
        """Rows that a pass may have here."""
        return self.num_rows if self.is_free else 0

    def write(self, layer: int, field: str, value: Tensor) -> None:
        """Store a field as it is stored, [n, elements], of the pass's first n rows."""
        start, width = self._fields[field]
        self.rows[layer][: len(value), start : start + width] = value
