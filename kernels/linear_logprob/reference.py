"""Plain torch: the formula, for autograd."""

from __future__ import annotations

from torch import Tensor


def linear_logprob(h_TD: Tensor, weight_VD: Tensor, rows_P: Tensor, targets_P: Tensor) -> Tensor:
    return (h_TD @ weight_VD.T).log_softmax(-1)[rows_P, targets_P]
