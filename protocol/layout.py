"""Shape of a recorded row: which activations of one token in one decoder layer are kept, and where.

One row per token and layer, `width` elements of `dtype`, columns in this order:

    | x [H] | q [n_q*d] | k [n_kv*d], only with q/k-norm | attn [n_q*d] | mid [H] | gate_up [2I] |

x        residual stream at the layer's input (before `input_layernorm`)
q        output of `qkv_proj` for the queries: before q-norm and rope, adapter included
k        the same for the keys; families without k-norm take keys from the KV pool alone
attn     attention output, the input of `o_proj`
mid      residual stream after attention (before `post_attention_layernorm`)
gate_up  output of `gate_up_proj`, adapter included

Keys (after norm and rope) and values are not here: they are in the KV pool, by slot.
The pool is one tensor per layer, `[num_rows, width]`, so a layer's fetch is one gather.
"""

from __future__ import annotations

import msgspec

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


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

    @property
    def fields(self) -> dict[str, tuple[int, int]]:
        """Column range of each field: name → (offset, width)."""
        widths = {
            "x": self.hidden_size,
            "q": self.num_heads * self.head_dim,
            "k": self.num_kv_heads * self.head_dim if self.has_qk_norm else 0,
            "attn": self.num_heads * self.head_dim,
            "mid": self.hidden_size,
            "gate_up": 2 * self.intermediate_size,
        }
        out: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, width in widths.items():
            if width:
                out[name] = (offset, width)
                offset += width
        return out

    @property
    def width(self) -> int:
        return sum(width for _, width in self.fields.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's rows over all layers."""
        return self.num_layers * self.width * DTYPE_BYTES[self.dtype]
