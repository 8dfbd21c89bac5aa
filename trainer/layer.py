"""The one decoder-layer function: computed, replayed, or any mixture.

Without `recorded` every primitive computes and the function returns its values. With it the
primitives return the recorded values and only their backward does work. What is elementwise (norms,
rope, SwiGLU) is recomputed either way.

Shapes: T tokens, Q of them queries (all, or in the last layer only those whose logits are wanted),
    H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from alchemist.kernels.gated_mlp import Pause, Projection, gated_mlp, no_pause
from alchemist.kernels.replay_linear import LoraPart, replay_linear, unread
from alchemist.kernels.rms_norm import add_rms_norm, rms_norm
from alchemist.kernels.rope import norm_rope, rope
from alchemist.kernels.swiglu import swiglu

from .families import ModelShape
from .lora import LoraAdapter
from .weights import LayerWeights

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [Q, n_q, d], keys [T, n_kv, d], values [T, n_kv, d]) → [Q, n_q, d]"""


def pauses(gate: Callable[[], None]) -> Pause:
    """`gate()` between a layer's operations, in both directions."""

    def pause(value: Tensor) -> Tensor:
        gate()
        if value.requires_grad:
            value.register_hook(lambda _: gate())
        return value

    return pause


@dataclass(frozen=True)
class LayerValues:
    """A layer's recorded values; names as in the row layout. `k` is raw keys, None without
    q/k-norm.
    """

    x: Tensor
    q: Tensor
    k: Tensor | None
    attn: Tensor
    mid: Tensor
    gate_up: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class LayerLora:
    """A layer's adapter, arranged by fused weight."""

    qkv: tuple[LoraPart, ...] = ()
    o: tuple[LoraPart, ...] = ()
    gate_up: tuple[LoraPart, ...] = ()
    down: tuple[LoraPart, ...] = ()
    scaling: float = 1.0

    @classmethod
    def of(
        cls, adapter: LoraAdapter | None, layer: int, shape: ModelShape, *, b_is_zero: bool = False
    ) -> LayerLora:
        """One layer of `adapter`; None: no adapter."""
        if adapter is None:
            return cls()
        matrices = adapter.layer(layer)

        def parts(modules: tuple[str, ...], widths: tuple[int, ...]) -> tuple[LoraPart, ...]:
            ends = [sum(widths[: i + 1]) for i in range(len(widths))]
            return tuple(
                LoraPart(end - width, end, *matrices[name], b_is_zero)
                for name, width, end in zip(modules, widths, ends, strict=True)
                if name in matrices
            )

        return cls(
            qkv=parts(("q_proj", "k_proj", "v_proj"), shape.qkv_splits),
            o=parts(("o_proj",), (shape.hidden_size,)),
            gate_up=parts(("gate_proj", "up_proj"), (shape.intermediate_size,) * 2),
            down=parts(("down_proj",), (shape.hidden_size,)),
            scaling=adapter.config.scaling,
        )


def decoder_layer(
    x_TH: Tensor,
    weights: LayerWeights,
    shape: ModelShape,
    lora: LayerLora,
    tables: tuple[Tensor, Tensor],
    attend: Attend,
    *,
    queries: Tensor | None = None,
    recorded: LayerValues | None = None,
    keep: bool = True,
    pause: Pause = no_pause,
) -> tuple[Tensor, Tensor, LayerValues]:
    """One layer.

    Args:
        tables: cos, sin [T, d/2].
        queries: int64 [Q] tokens that are carried past the keys and values; None: all.
        recorded: values of all T tokens (x, keys, values, k) and of the Q queries (the rest).
        keep: whether the values are to be replayed: else `gate_up` is a placeholder (`unread`).
        pause: called between operations.

    Returns:
        `mid` and the MLP's output, both [Q, H], whose sum is the layer's output (the same gradient
        goes into both), and the layer's values.
    """
    eps, heads, kv_heads, dim = (
        shape.rms_norm_eps,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
    )
    residual, normed = add_rms_norm(x_TH, None, weights.input_norm, eps)
    q, k, v = _qkv(pause(normed), weights, shape, lora, queries, recorded)
    pause(q)
    cos, sin = tables
    q_cos, q_sin = tables
    if queries is not None:
        q_cos, q_sin, residual = cos[queries], sin[queries], residual[queries]
    q_heads, k_heads = q.unflatten(-1, (heads, dim)), k.unflatten(-1, (kv_heads, dim))
    known = recorded.keys if recorded else None
    if weights.q_norm is not None and weights.k_norm is not None:
        queries_QND = norm_rope(q_heads, weights.q_norm, eps, q_cos, q_sin)
        keys = norm_rope(k_heads, weights.k_norm, eps, cos, sin, known)
    else:
        queries_QND = rope(q_heads, q_cos, q_sin)
        keys = rope(k_heads, cos, sin, known)
    values = v.unflatten(-1, (kv_heads, dim))
    attn = pause(attend(queries_QND, keys, values).flatten(1))

    outputs_shape = (attn.shape[0], shape.hidden_size)
    skip = (unread(outputs_shape, attn),) if recorded else None
    (o,) = replay_linear(attn, weights.o, weights.o_bias, lora.o, lora.scaling, recorded=skip)
    mid, normed = add_rms_norm(
        residual, o, weights.post_attention_norm, eps, recorded.mid if recorded else None
    )
    gate_up, down = gated_mlp(
        pause(normed),
        Projection(weights.gate_up, weights.gate_up_bias, lora.gate_up),
        Projection(weights.down, weights.down_bias, lora.down),
        lora.scaling,
        recorded.gate_up if recorded else None,
        keep=keep,
        pause=pause,
    )
    kept_k = k if weights.k_norm is not None else None
    return mid, down, LayerValues(x_TH, q, kept_k, attn, mid, gate_up, keys, values)


def mlp_input(mid: Tensor, weights: LayerWeights, lora: LayerLora, eps: float) -> Tensor:
    """A layer's `gate_up` from its recorded `mid`."""
    (gate_up,) = replay_linear(
        rms_norm(mid, weights.post_attention_norm, eps),
        weights.gate_up,
        weights.gate_up_bias,
        lora.gate_up,
        lora.scaling,
    )
    return gate_up


def mlp_output(mid: Tensor, gate_up: Tensor, weights: LayerWeights, lora: LayerLora) -> Tensor:
    """A layer's output from its recorded `mid` and `gate_up`."""
    (down,) = replay_linear(
        swiglu(gate_up), weights.down, weights.down_bias, lora.down, lora.scaling
    )
    return mid + down


def _qkv(
    normed: Tensor,
    weights: LayerWeights,
    shape: ModelShape,
    lora: LayerLora,
    queries: Tensor | None,
    recorded: LayerValues | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q_width, *kv_widths = shape.qkv_splits
    outputs = None
    if recorded is not None:
        k = recorded.k
        if k is None:
            # Rope's backward does not read its input, so the keys before rope are not needed.
            k = unread((normed.shape[0], kv_widths[0]), normed)
        outputs = (recorded.q, k, recorded.values.flatten(1))
    if queries is None:
        q, k, v = replay_linear(
            normed, weights.qkv, weights.qkv_bias, lora.qkv, lora.scaling, shape.qkv_splits, outputs
        )
        return q, k, v
    bias = weights.qkv_bias
    (q,) = replay_linear(
        normed[queries],
        weights.qkv[:q_width],
        None if bias is None else bias[:q_width],
        tuple(p for p in lora.qkv if p.end <= q_width),
        lora.scaling,
        recorded=outputs[:1] if outputs else None,
    )
    k, v = replay_linear(
        normed,
        weights.qkv[q_width:],
        None if bias is None else bias[q_width:],
        tuple(
            p._replace(start=p.start - q_width, end=p.end - q_width)
            for p in lora.qkv
            if p.start >= q_width
        ),
        lora.scaling,
        kv_widths,
        outputs[1:] if outputs else None,
    )
    return q, k, v
