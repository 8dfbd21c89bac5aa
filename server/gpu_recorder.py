"""Records activations on a GPU: two kernels a layer pack them into their rows, on the stream of the pass itself.

SGLang's fused kernels write into their inputs, so nothing can be kept for later: x and q (and k) are packed when
`qkv_proj` has run, before rope and attention; attn, mid and gate_up when `gate_up_proj` has, before the next norm adds
to the residual. With `--activation-dtype fp8` a kernel of its own encodes gate_up first. Nothing here waits for the
device, and nothing needs the tokens' slots: a row is known by its number, and its slots lie in a table on the device
(`GpuTier.table`).

Which row a token has is a tensor that the kernels read, [tokens] int64, −1 for a token that is not recorded. For
decode steps it is always the same tensor. The taps are in place when SGLang captures its decode graphs, so packing is
part of them, and a replay, which runs no Python, records the rows that `begin` has put there. A step of which nothing
is recorded finds −1 everywhere.

Rows that find no slot are staged (`staging.py`); not those of decode steps, where nothing may depend on the step.

A token that cannot be recorded is simply computed again by the trainer. What goes wrong here is raised by `begin` and
`end`, never in the middle of a forward pass.
Not run on a GPU yet.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from alchemist.kernels import fp8_rows
from alchemist.kernels.pack_rows import Field, pack_rows
from alchemist.protocol.layout import RowLayout
from alchemist.protocol.streams import to_device
from alchemist.server.gpu_tier import GpuTier
from alchemist.server.ids import Ids
from alchemist.server.pool import ActivationPool
from alchemist.server.recorder import Tap, taps_of

_BEFORE_ATTENTION = ("x", "q", "k")
_AFTER_IT = ("attn", "mid", "gate_up")


class GpuRecorder:
    """Fills `pool` during the forward passes of one model runner. The same calls as `recorder.Recorder`."""

    def __init__(
        self,
        model: torch.nn.Module,
        layout: RowLayout,
        pool: ActivationPool,
        *,
        max_decode_tokens: int,
    ) -> None:
        """Args:
        model: SGLang's causal LM; LoRA wrappers, if any, already in place.
        max_decode_tokens: of one decode step; 0: decode steps are not recorded.
        """
        assert isinstance(pool.device, GpuTier)
        self._pool, self._tier, self._layout = pool, pool.device, layout
        self._first_cell = {
            name: offset // layout.cell for name, (offset, _) in layout.fields.items()
        }
        device = self._tier.table.device
        self._decode_rows = torch.full((max_decode_tokens,), -1, dtype=torch.int64, device=device)
        # Captured graphs read them for as long as they are replayed, whatever becomes of the recorder.
        self._tier.kept.append(self._decode_rows)
        self._rows = self._decode_rows
        """Of the tokens of the pass that is being computed, or captured."""
        self._staged: torch.Tensor | None = None
        """Tokens of the pass whose rows find no slot, int64."""
        self._recorded: Ids = np.empty(0, np.int64)
        self._fields: dict[str, torch.Tensor] = {}
        self._last_before_attention = "k" if layout.has_qk_norm else "q"
        self._error: Exception | None = None
        self.num_recorded = 0
        self._taps: list[Tap] = taps_of(model, layout, lambda layer: partial(self._take, layer))
        if max_decode_tokens:
            self._install()

    def begin(
        self,
        slots: torch.Tensor,
        positions: torch.Tensor,
        which: torch.Tensor | None = None,
        *,
        is_decode: bool = False,
    ) -> bool:
        """A forward starts; its token i is at `positions[i]` and writes K/V slot `slots[i]`. Whether any is recorded.

        Args:
            slots: on the device.
            positions: on the CPU.
            which: int64, ascending, on the CPU: the tokens to be recorded; None: all.
        """
        num_tokens = slots.numel()
        tokens = np.arange(num_tokens) if which is None else which.numpy()
        if which is not None:
            positions = positions[which]
            slots = slots[to_device(tokens, slots.device)]
        if self._error is not None:
            raise self._error
        if is_decode and num_tokens > self._decode_rows.numel():
            return False
        recorded = self._pool.record(slots, positions, is_graph=is_decode)
        if not recorded.size:
            self._pool.complete(recorded)
            return False
        tokens, on_host = tokens[: recorded.size], recorded >= self._pool.num_device_rows
        rows = np.full(num_tokens, -1)
        rows[tokens] = np.where(on_host, -1, recorded)
        on_device = to_device(rows, slots.device)
        if on_host.any():
            self._staged = to_device(tokens[on_host], slots.device)
        if is_decode:
            self._decode_rows[:num_tokens].copy_(on_device)
        else:
            self._rows = on_device
        self._recorded = recorded
        self.num_recorded += recorded.size
        self._install()
        return True

    def end(self) -> None:
        """The forward is enqueued."""
        if self._decode_rows.numel():
            self._decode_rows.fill_(-1)
        else:
            self._remove()
        self._rows, self._staged = self._decode_rows, None
        self._fields.clear()
        if self._error is not None:
            raise self._error
        self._pool.complete(self._recorded)

    def release(self) -> None:
        """Leave the model as if nobody recorded. Captured graphs go on reading their rows: −1 from here on."""
        self._remove()
        self._decode_rows.fill_(-1)

    def flush(self) -> None:
        """Nothing is kept."""

    def relieve(self) -> None:
        """Nothing is kept."""

    def flush_some(self) -> bool:
        """Nothing is kept."""
        return False

    def _install(self) -> None:
        for tap in self._taps:
            tap.install()

    def _remove(self) -> None:
        for tap in self._taps:
            tap.remove()

    def _take(self, layer: int, field: str, value: torch.Tensor) -> None:
        """A tensor [tokens, width] of the pass goes by."""
        self._fields[field] = value
        if field == self._last_before_attention:
            self._pack(layer, _BEFORE_ATTENTION)
        elif field == "gate_up":
            self._pack(layer, _AFTER_IT)

    def _pack(self, layer: int, names: tuple[str, ...]) -> None:
        fields = [(name, self._fields.pop(name)) for name in names if name in self._fields]
        num_tokens = fields[0][1].shape[0]
        # A prefill that is not recorded passes the taps of decode recording, too.
        if self._error is not None or num_tokens > self._rows.numel():
            return
        try:
            fields = [
                (name, fp8_rows.encode(value) if self._layout.is_encoded(name) else value)
                for name, value in fields
            ]
            pack_rows(
                [Field(value, self._first_cell[name]) for name, value in fields],
                self._rows[:num_tokens],
                self._tier.table,
                *self._tier.plane(layer),
            )
            if self._staged is not None:
                for name, value in fields:
                    self._tier.staging.write(layer, name, value[self._staged])
        except Exception as error:
            # Whatever it is: the model is computing somebody's answer. `end` raises it, or the next `begin`.
            self._error = error
