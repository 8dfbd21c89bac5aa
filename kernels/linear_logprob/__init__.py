"""LM head and log-probability of given tokens, a chunk of tokens at a time.

    logp[p] = log_softmax(h[row p] Wᵀ)[target p]

No [tokens, vocabulary] tensor outlives its chunk. The gradient needs no second pass over the
vocabulary: it is linear in d logp, d h = Σ_p d logp_p · (W[target_p] − Σ_v softmax_v W_v), so the
forward keeps, for a token with the first target t, the row Σ_v softmax_v W_v − W_t, [T, D]. In that
form 16 bits hold the gradient of a token that is nearly certain: 1 is taken from its probability
before it is rounded.

On a GPU the logits are the float32 sums of a 16-bit product and the gradient's sums have a fixed
order. Liger's fused linear losses return a loss over one target a token, not the log-probabilities.
Not run on a GPU yet; to be measured there: the chunk's size, and the share of the softmax pass.

Shapes: T tokens, D hidden, V vocabulary, P (token, target) pairs; one token may have several
    targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alchemist.kernels.dispatch import matmul, uses_triton
from alchemist.kernels.replay_linear import linear

CHUNK_BYTES = 32 << 20


class LinearLogprob(NamedTuple):
    """Log-probabilities and what their gradient needs."""

    logps: Tensor
    """[P] float32 (float64 inputs: float64)."""
    excess: Tensor | None
    """[T, D] Σ_v softmax_v W_v, less the row of W of the token's first target; None when no gradient was asked for."""


def linear_logprob(
    h_TD: Tensor, weight_VD: Tensor, rows_P: Tensor, targets_P: Tensor, *, gradient: bool
) -> LinearLogprob:
    """Log-probabilities of `targets_P` after the tokens `rows_P` (int64, `rows_P` ascending).

    `weight_VD` ends at the vocabulary: pass a slice when the table is padded. Softmax in float32 at
    least.
    """
    if uses_triton(h_TD):
        from . import triton

        return LinearLogprob(*triton.forward(h_TD, weight_VD, rows_P, targets_P, gradient=gradient))
    wide = torch.float64 if h_TD.dtype == torch.float64 else torch.float32
    logps = torch.empty(rows_P.shape, dtype=wide, device=h_TD.device)
    excess = torch.empty_like(h_TD) if gradient else None
    size = max(1, CHUNK_BYTES // (weight_VD.shape[0] * wide.itemsize))
    bounds = torch.arange(0, h_TD.shape[0] + size, size, device=rows_P.device)
    cuts = torch.searchsorted(rows_P, bounds).tolist()
    for i, start in enumerate(range(0, h_TD.shape[0], size)):
        logits = linear(h_TD[start : start + size], weight_VD).to(wide)
        pairs = slice(cuts[i], cuts[i + 1])
        logsumexp = torch.logsumexp(logits, dim=-1, keepdim=True)
        rows = rows_P[pairs] - start
        logps[pairs] = logits[rows, targets_P[pairs]] - logsumexp[rows, 0]
        if excess is not None:
            probabilities = logits.sub_(logsumexp).exp_()
            first = _is_first(rows)
            probabilities[rows[first], targets_P[pairs][first]] -= 1
            excess[start : start + size] = matmul(probabilities.to(weight_VD.dtype), weight_VD)
    return LinearLogprob(logps, excess)


def linear_logprob_backward(
    result: LinearLogprob, weight_VD: Tensor, rows_P: Tensor, targets_P: Tensor, d_logps_P: Tensor
) -> Tensor:
    """d h [T, D] for the gradient `d_logps_P` of the log-probabilities of the same pairs."""
    assert result.excess is not None
    if uses_triton(result.excess):
        from . import triton

        return triton.backward(result.excess, weight_VD, rows_P, targets_P, d_logps_P)
    wide = d_logps_P.dtype
    total = torch.zeros(result.excess.shape[0], dtype=wide, device=d_logps_P.device)
    total.index_add_(0, rows_P, d_logps_P)
    d_h = result.excess.to(wide) * -total[:, None]
    is_first = _is_first(rows_P)
    if not bool(is_first.all()):
        other = ~is_first
        # The place of each token's first pair, for all of its pairs.
        first = targets_P[is_first][is_first.cumsum(0)[other] - 1]
        apart = weight_VD[targets_P[other]].to(wide) - weight_VD[first].to(wide)
        d_h.index_add_(0, rows_P[other], apart * d_logps_P[other, None])
    return d_h.to(result.excess.dtype)


def _is_first(rows_P: Tensor) -> Tensor:
    """[P] whether a pair is the first of its token."""
    is_first = torch.ones_like(rows_P, dtype=torch.bool)
    is_first[1:] = rows_P[1:] != rows_P[:-1]
    return is_first
