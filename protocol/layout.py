"""Shape of a recorded row: which activations of one token in one decoder layer are kept, and where.

One row per token and layer, `width` elements of `dtype`, fields in this order, each from the next whole cell on:

    | x [H] | q [n_q*d] | k [n_kv*d], only with q/k-norm | attn [n_q*d] | mid [H] | gate_up [2I] | keys | values |

x        residual stream at the layer's input (before `input_layernorm`)
q        output of `qkv_proj` for the queries: before q-norm and rope, adapter included
k        the same for the keys; families without k-norm take keys from the KV pool alone
attn     attention output, the input of `o_proj`
mid      residual stream after attention (before `post_attention_layernorm`)
gate_up  output of `gate_up_proj`, adapter included
keys     the token's keys after norm and rope, as the KV pool holds them; on the host only
values   its values; on the host only

With `activation_dtype` fp8, `gate_up` is stored in eight bits, as `kernels.fp8_rows` encodes it: 2I bytes and a scale,
in as many elements of `dtype` as they need. `widths` has a field's width in the model, `fields` that of where it lies.

A cell is what one KV slot holds of keys (or of values) in one layer, `cell` elements. On the host a row lies as above,
`[num_rows, width]` per layer. On the device a row lies in `slots_per_row` borrowed KV slots: its first half of cells
in layer ℓ's key buffer, one cell per slot, the rest in the value buffer; keys and values of the token are read where
serving has them, in the token's own slot.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_SCALE_BYTES = 4
"""Of a row in eight bits."""

ActivationDtype = Literal["auto", "fp8"]


class Part(NamedTuple):
    """A run of a field's cells in one of the two KV buffers."""

    plane: int
    """0: keys, 1: values."""
    first: int
    """First slot of the row that holds it."""
    num_cells: int
    """One a slot."""
    offset: int
    """Elements of the field before it."""


class RowLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes are in elements; `dtype` is torch's name of the serving dtype."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    has_qk_norm: bool
    dtype: str
    cell: int
    """Elements of `dtype` in one slot's keys of one layer. Less than n_kv*d where the KV cache is narrower than the
    activations: cells are bytes, whatever SGLang keeps in them.
    """
    page_size: int = 1
    """Slots are borrowed in whole pages."""
    activation_dtype: ActivationDtype = "auto"
    """auto: every field in `dtype`; fp8: `gate_up` in eight bits."""

    def __post_init__(self) -> None:
        if self.activation_dtype == "fp8" and self.intermediate_size % 2:
            raise ValueError(
                "activation_dtype is 'fp8'; allowed: auto, or a model with an even intermediate_size, "
                f"not {self.intermediate_size}"
            )

    def is_encoded(self, field: str) -> bool:
        """Whether a field is stored otherwise than the model has it."""
        return field == "gate_up" and self.activation_dtype == "fp8"

    @property
    def widths(self) -> dict[str, int]:
        """Elements of each recorded field as the model has it."""
        widths = {
            "x": self.hidden_size,
            "q": self.num_heads * self.head_dim,
            "k": self.num_kv_heads * self.head_dim if self.has_qk_norm else 0,
            "attn": self.num_heads * self.head_dim,
            "mid": self.hidden_size,
            "gate_up": 2 * self.intermediate_size,
            "keys": self.cell,
            "values": self.cell,
        }
        return {name: width for name, width in widths.items() if width}

    @property
    def fields(self) -> dict[str, tuple[int, int]]:
        """Column range of each field on the host: name → (offset, elements it is stored in)."""
        out: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, width in self.widths.items():
            if self.is_encoded(name):
                width = -(-(width + _SCALE_BYTES) // DTYPE_BYTES[self.dtype])
            out[name] = (offset, width)
            offset += -(-width // self.cell) * self.cell
        return out

    @property
    def width(self) -> int:
        """Elements of one token's row in one layer, keys and values included."""
        offset, width = self.fields["values"]
        return offset + width

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row over all layers, on the host."""
        return self.num_layers * self.width * DTYPE_BYTES[self.dtype]

    @property
    def slots_per_row(self) -> int:
        """KV slots that one token's row takes on the device: whole pages."""
        cells = self.fields["keys"][0] // self.cell
        return -(-cells // (2 * self.page_size)) * self.page_size

    @property
    def half_flops_position(self) -> float:
        """Position of a token whose attention takes as many FLOPs as its linears."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linears = self.hidden_size * (2 * q + 2 * kv + 3 * self.intermediate_size)
        return linears / (2 * q)

    def parts(self, field: str) -> list[Part]:
        """Where a field's cells lie on the device."""
        offset, width = self.fields[field]
        first, end = offset // self.cell, -(-(offset + width) // self.cell)
        half = self.slots_per_row
        parts = []
        for plane, (low, high) in enumerate(((0, half), (half, 2 * half))):
            begin, stop = max(first, low), min(end, high)
            if begin < stop:
                parts.append(Part(plane, begin - low, stop - begin, begin * self.cell - offset))
        return parts
